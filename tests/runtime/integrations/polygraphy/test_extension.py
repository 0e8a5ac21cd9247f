"""`polygraphy run` as a user runs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import polygraphy
import pytest

from hivtp.engines import EngineName
from hivtp.runtime.integrations.polygraphy.comparison import ENGINES
from hivtp.runtime.integrations.polygraphy.extension import argument_groups
from hivtp_ops.errors import EngineError
from tests.support.faults import SCORING_WEIGHT, alter_weight

COMMAND = Path(sysconfig.get_path("scripts")) / "polygraphy"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        # Polygraphy's own checks of what extends it.
        env=os.environ | {"POLYGRAPHY_INTERNAL_CORRECTNESS_CHECKS": "1"} | environment,
        check=False,
    )


def polygraphy_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(COMMAND, "run", *arguments)


def graph(bundle: Path) -> Path:
    return bundle / "vision" / "model.onnx"


def test_the_entry_point_is_installed():
    [entry] = importlib.metadata.entry_points(group="polygraphy.run.plugins", name="hivtp")
    assert entry.load() is argument_groups


def test_help_shows_every_engine_and_option():
    done = polygraphy_run("--help")
    assert done.returncode == 0, done.stderr
    for engine in ENGINES:
        assert f"[--hivtp-{engine}]" in done.stdout
    for option in ("images IMAGE [IMAGE ...]", "checkpoint DIR", "threads N", "trust-plans", "min-kept-agreement X"):
        assert f"[--hivtp-{option}]" in done.stdout
    assert "perceptual_metrics,hivtp}" in done.stdout


def test_every_engine_but_auto_has_a_runner():
    assert {*ENGINES, "auto"} == {*EngineName.__args__, "transformers"}


def test_engines_agree_on_images(either_bundle, tiny_checkpoint, next_checkpoint, images, request):
    is_next = either_bundle == request.getfixturevalue("next_bundle")
    runners = ["--hivtp-onnxruntime", "--onnxrt", "--hivtp-transformers", "--hivtp-threads", 1]
    checkpoint = ["--hivtp-checkpoint", next_checkpoint if is_next else tiny_checkpoint]
    compare = ["--compare", "hivtp", "--hivtp-max-score-error", 1e-4]
    done = polygraphy_run(graph(either_bundle), *runners, *checkpoint, *compare, "--hivtp-images", *images)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept patches agree to 1.000 (worst tile 1.000)") == 2 * 3
    assert done.stdout.count("Passed: 3/3 iterations") == 2
    assert ("patch_mask [dtype=bool, shape=(4, 64)]" in done.stdout) == is_next


def test_altered_weights_fail(bare_bundle, tmp_path, images):
    saved, found = tmp_path / "outputs.json", tmp_path / "found.json"
    done = polygraphy_run(graph(bare_bundle), "--hivtp-onnxruntime", "--hivtp-images", *images, "--save-outputs", saved)
    assert done.returncode == 0, done.stdout + done.stderr
    altered = alter_weight(bare_bundle, tmp_path / "altered", SCORING_WEIGHT, 3)
    compare = ["--load-outputs", saved, "--compare", "hivtp", "--save-accuracy-results", found]
    done = polygraphy_run(graph(altered), "--onnxrt", "--hivtp-images", *images, *compare)
    assert done.returncode == 1
    assert "FAILED: kept patches agree to" in done.stdout
    [[_, runs]] = json.loads(found.read_text())["lst"][0]["lst"]
    assert len(runs) == 3
    assert all(outputs["image_embeds"]["importance_error"] > 0.1 for outputs in runs)


def test_the_script_that_it_writes_does_the_same_by_itself(next_bundle, tmp_path, images):
    script = tmp_path / "compare.py"
    arguments = ["--hivtp-onnxruntime", "--onnxrt", "--compare", "hivtp", "--hivtp-images", *images]
    done = polygraphy_run(graph(next_bundle), *arguments, "--gen-script", script)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(sys.executable, script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 3/3 iterations" in done.stdout


def test_a_bundle_is_run_by_its_folder_too(next_int8_bundle, images):
    done = polygraphy_run(next_int8_bundle, "--hivtp-onnxruntime", "--hivtp-images", images[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pixel_values [dtype=float32, shape=(5, 3, 64, 64)]" in done.stdout


def test_without_images_polygraphy_makes_its_own_inputs(bare_bundle):
    done = polygraphy_run(graph(bare_bundle), "--hivtp-onnxruntime", "--onnxrt", "--compare", "hivtp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 1/1 iterations" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hivtp-onnxruntime", "--hivtp-images", "/nowhere.png"], "there is no image file '/nowhere.png'"),
        (["--hivtp-transformers"], "name its folder as the checkpoint"),
        (["--hivtp-onnxruntime", "--hivtp-threads", 0], "num_threads must be a whole number from 1 to"),
        (["--hivtp-onnxruntime", "--hivtp-images", "a.png", "--load-inputs", "b.json"], "leave --load-inputs"),
    ],
)
def test_bad_input_is_one_line(bare_bundle, arguments, message):
    done = polygraphy_run(graph(bare_bundle), *arguments)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("[!] ")
    assert message in line


def test_a_graph_outside_of_a_bundle_is_one_line(tmp_path):
    file = tmp_path / "model.onnx"
    file.touch()
    done = polygraphy_run(file, "--hivtp-onnxruntime")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "does not lie in a bundle" in line


def test_another_polygraphy_goes_on_without_it(monkeypatch):
    monkeypatch.setattr(polygraphy, "__version__", "0.60.1")
    with pytest.raises(EngineError, match=r"hivtp works with 0\.53"):
        argument_groups()
