from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hivtp.main import main
from hivtp.runtime.integrations.polygraphy.comparison import ALL_ENGINES
from tests.support.faults import LATER_WEIGHT, alter_weight

if TYPE_CHECKING:
    from pathlib import Path

CPU = ("--engines", "onnxruntime,polygraphy-onnxrt", "--rounds", "1")
HEADER = ["bundle", "graph", "engine", "tokens", "kept", "sets", "worst", "tile", "embeddings", "median", "token"]


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that fails before it writes anything."""
    code, out, err = compare(capsys, *arguments)
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("hivtp compare: ")
    return line


def test_engines_stand_in_a_table_and_all_agree(bare_bundle, photo, capsys):
    code, out, err = compare(capsys, bare_bundle, photo, *CPU)
    assert (code, err) == (0, "")
    header, reference, same, blank, *_ = out.splitlines()
    assert header.split()[: len(HEADER)] == HEADER
    assert reference.split()[:5] == ["bundle", "fp32", "onnxruntime", "32.0", "reference"]
    expected = ["bundle", "fp32", "polygraphy-onnxrt", "32.0", "1.000", "1.000", "0.0e+00", "0.0e+00", "0.0e+00"]
    assert same.split()[:9] == expected
    assert blank == ""
    # Numbers stand under the right ends of their headers.
    assert same.index("1.000") + len("1.000") == header.index("kept sets") + len("kept sets")
    assert "cannot run here" not in out
    assert "beyond the tolerance" not in out


def test_all_engines_are_tried_and_those_that_cannot_run_are_listed(bare_bundle, photo, capsys):
    code, out, _ = compare(capsys, bare_bundle, photo, "--rounds", 1)
    assert code == 0
    failed = out.partition("cannot run here:\n")[2].splitlines()
    ran = [line.split()[2] for line in out.splitlines()[1:] if line.startswith("bundle ")]
    named = [line.strip().partition(":")[0] for line in failed]
    assert "onnxruntime" in ran
    assert "transformers" in named
    assert sorted([*ran, *named]) == sorted(ALL_ENGINES)


def test_a_fault_is_named_and_the_exit_code_is_1(bare_bundle, photo, tmp_path, capsys):
    altered = alter_weight(bare_bundle, tmp_path / "altered", LATER_WEIGHT, 1.05)
    code, out, err = compare(capsys, bare_bundle, photo, "--bundle", altered, *CPU)
    assert code == 1
    assert err == "hivtp compare: 2 of 3 comparisons are beyond their tolerance\n"
    problems = out.partition("beyond the tolerance:\n")[2].splitlines()
    assert len(problems) == 2
    assert problems[0].startswith(f"  {altered} in onnxruntime: embeddings differ by 0.0")
    assert "allowed is at most 0.0001" in problems[0]


def test_other_bounds_may_be_given(bare_bundle, exact_bundle, photo, capsys):
    arguments = [bare_bundle, photo, "--bundle", exact_bundle, "--engines", "onnxruntime", "--rounds", 1]
    assert compare(capsys, *arguments)[0] == 1
    assert compare(capsys, *arguments, "--min-kept-agreement", 0.2)[0] == 0
    assert compare(capsys, *arguments, "--min-kept-agreement", 0.2, "--max-embeddings-error", -1)[0] == 1
    assert compare(capsys, *arguments, "--min-kept-agreement", 0.2, "--max-score-error", -1)[0] == 1


def test_json_is_one_object(bare_bundle, exact_bundle, photo, capsys):
    options = ["--bundle", exact_bundle, "--engines", "onnxruntime", "--rounds", 3, "--json"]
    code, out, err = compare(capsys, bare_bundle, photo, photo, *options)
    assert code == 1
    assert err == "hivtp compare: 1 of 1 comparisons are beyond their tolerance\n"
    found = json.loads(out)
    assert found["num_images"] == 2
    reference, other = found["systems"]
    assert reference["is_reference"]
    assert other["bundle"] == str(exact_bundle)
    assert other["kept_tokens"] == [21, 21]
    assert other["problems"][0].startswith("kept patches agree to")
    assert [len(samples) for samples in other["latency_ms"]["samples"]] == [2, 2, 2]


def test_an_engine_that_was_named_and_cannot_run_is_exit_code_1(bare_bundle, photo, capsys):
    code, out, err = compare(capsys, bare_bundle, photo, "--engines", "onnxruntime,transformers")
    assert code == 1
    assert "cannot run here:\n  transformers: it runs the tower" in out
    assert err == f"hivtp compare: cannot run here: {bare_bundle} in transformers\n"


def test_the_tower_of_the_checkpoint_is_an_engine(bare_bundle, tiny_checkpoint, photo, capsys):
    options = ["--engines", "transformers,onnxruntime", "--checkpoint", tiny_checkpoint, "--max-score-error", 1e-4]
    code, out, err = compare(capsys, bare_bundle, photo, *options, "--threads", 1, "--rounds", 1)
    assert (code, err) == (0, "")
    assert [line.split()[2] for line in out.splitlines()[1:3]] == ["transformers", "onnxruntime"]


def test_bad_input_is_one_line_and_exit_code_1(bare_bundle, photo, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:100_000])
    assert "broken.png': the PNG image is truncated" in refused(capsys, bare_bundle, photo, broken, *CPU)
    assert "there is no image file" in refused(capsys, bare_bundle, tmp_path / "absent.png", *CPU)
    assert "is a directory" in refused(capsys, bare_bundle, tmp_path, *CPU)
    assert "is not a folder; give the folder that hivtp export wrote" in refused(capsys, photo, photo, *CPU)
    assert "has no manifest.json" in refused(capsys, bare_bundle, photo, "--bundle", tmp_path, *CPU)
    assert "no engine is named 'caffe'; there are" in refused(capsys, bare_bundle, photo, "--engines", "caffe")
    assert "no engine is named ''" in refused(capsys, bare_bundle, photo, "--engines", "onnxruntime,")
    assert "rounds must be a whole number" in refused(capsys, bare_bundle, photo, "--rounds", 0)
    engines = ["--engines", "onnxruntime", "--threads", 0]
    assert "num_threads must be a whole number from 1" in refused(capsys, bare_bundle, photo, *engines)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    missing = "polygraphy is not installed; install it with: pip install 'hivtp[compare]'"
    assert refused(capsys, bare_bundle, photo, *CPU) == f"hivtp compare: {missing}"


def test_no_image_is_wrong_usage(bare_bundle, capsys):
    assert main(["compare", str(bare_bundle)]) == 2
    assert "the following arguments are required: IMAGE" in capsys.readouterr().err


def test_an_image_may_come_from_a_pipe(bare_bundle, photo: Path):
    command = [sys.executable, "-m", "hivtp.main", "compare", bare_bundle, "-", *CPU]
    with photo.open("rb") as stream:
        done = subprocess.run(command, stdin=stream, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "polygraphy-onnxrt" in done.stdout


@pytest.mark.parametrize("code", ["main(['compare', '--help'])", "import hivtp.runtime.cli.compare"])
def test_polygraphy_is_not_imported_before_it_is_asked_for(code):
    script = f"import sys\nfrom hivtp.main import main\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    script += "print([name for name in ('polygraphy', 'onnxruntime', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
