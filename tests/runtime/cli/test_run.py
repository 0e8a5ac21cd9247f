from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from tests.support.command import COMMAND, hivtp_run

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "What is in the picture?"


def test_the_answer_comes_first_then_the_counts_and_timings(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20)
    assert (done.returncode, done.stderr) == (0, "")
    answer, report = done.stdout.split("\n\n", 1)
    assert answer == pruned.generate(PROMPT, [photo], max_new_tokens=20).text
    names = [line.split("  ")[0] for line in report.splitlines()]
    assert names == [
        "visual tokens",
        "preprocess",
        "vision",
        "prefill",
        "first token",
        "decode",
        "20 tokens, finished by length",
    ]
    assert "visual tokens  64 -> 32" in report


def test_json_is_one_object_with_exactly_the_documented_keys(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        "text",
        "token_ids",
        "num_image_tokens",
        "num_kept_tokens",
        "kept_indices",
        "finish_reason",
        "timings",
    ]
    assert list(found.pop("timings")) == [
        "preprocess_ms",
        "vision_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
    ]
    expected = pruned.generate(PROMPT, [photo], max_new_tokens=20).to_dict()
    del expected["timings"]
    assert found == expected


def test_several_images_stand_where_the_prompt_marks_them(pruned_bundle, pruned, photos):
    files = [photos / "astronaut.png", photos / "coffee.png"]
    prompt = "Is <image> brighter than <image>?"
    done = hivtp_run(
        pruned_bundle,
        "--image",
        files[0],
        prompt,
        "--image",
        files[1],
        "--max-new-tokens",
        20,
        "--json",
        "--check-hashes",
    )
    found = json.loads(done.stdout)
    assert found["token_ids"] == pruned.generate(prompt, files, max_new_tokens=20).token_ids
    assert len(found["kept_indices"]) == 2


def test_sampling_options_reach_the_sampler(pruned_bundle, pruned, photo):
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 3}
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20, "--json", *options)
    expected = pruned.generate(PROMPT, [photo], max_new_tokens=20, **settings).token_ids
    assert json.loads(done.stdout)["token_ids"] == expected
    assert expected != pruned.generate(PROMPT, [photo], max_new_tokens=20).token_ids


def test_a_text_only_prompt_is_answered(pruned_bundle):
    done = hivtp_run(pruned_bundle, "how many dogs", "--max-new-tokens", 3, "--threads", 1)
    assert done.returncode == 0
    assert "visual tokens  0 -> 0" in done.stdout


def test_an_overlay_is_written_for_each_image(pruned_bundle, unpruned_bundle, photos, tmp_path):
    coffee, chelsea = ["--image", photos / "coffee.png"], ["--image", photos / "chelsea.png"]
    options = ["--max-new-tokens", 1, "--overlay"]
    one = hivtp_run(pruned_bundle, PROMPT, *coffee, *options, tmp_path / "one.png")
    assert (one.returncode, one.stderr) == (0, f"wrote {tmp_path / 'one.png'}\n")
    two = hivtp_run(unpruned_bundle, "<image> <image>", *coffee, *chelsea, *options, tmp_path / "two.png")
    assert two.returncode == 0
    assert {file.name for file in tmp_path.iterdir()} == {"one.png", "two-1.png", "two-2.png"}
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert min(picture.size) >= 672
            picture.load()


def test_what_a_terminal_cannot_show_is_replaced(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 40, PYTHONIOENCODING="ascii")
    text = pruned.generate(PROMPT, [photo], max_new_tokens=40).text
    assert not text.isascii()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(text.encode("ascii", "replace").decode())


@pytest.fixture(scope="module")
def endless_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on for minutes: a long context, and an end that it does not write."""
    folder = tmp_path_factory.mktemp("endless")
    text = {"initializer_range": 0.2, "max_position_embeddings": 65536, "eos_token_id": 0}
    checkpoint = make_checkpoint(folder / "checkpoint", text=text)
    return export_bundle(checkpoint, folder / "bundle", ExportSettings(preset="64"), is_quiet=True).folder


def endless_run(endless_bundle: Path, *options: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [COMMAND, endless_bundle, PROMPT, "--max-new-tokens", "60000", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_ctrl_c_ends_a_run_quietly_with_130(endless_bundle):
    process = endless_run(endless_bundle)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b"\nhivtp-run: stopped\n"


def test_a_reader_that_leaves_ends_a_run_quietly(endless_bundle):
    process = endless_run(endless_bundle)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_pipeline_in_python_and_the_command_agree_on_defaults(pruned_bundle, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--json")
    assert json.loads(done.stdout)["token_ids"] == Pipeline.load(pruned_bundle).generate(PROMPT, [photo]).token_ids
