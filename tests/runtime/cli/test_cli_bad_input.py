from __future__ import annotations

import json
import shutil
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from hivtp.engines.manifest import SCHEMA_VERSION
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from tests.support.command import hivtp_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = "What is in the picture?"


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that must fail before it writes anything."""
    done = hivtp_run(*arguments)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("hivtp-run: ")
    return lines[0]


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pruned_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("arguments", [[], ["bundle"], ["bundle", "what", "--max-new-tokens", "many"], ["--colour"]])
def test_wrong_usage_exits_with_2_and_the_usage(arguments):
    done = hivtp_run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: hivtp-run")
    assert "Traceback" not in done.stderr


def make_absent(bundle: Path) -> None:
    shutil.rmtree(bundle)


def make_empty(bundle: Path) -> None:
    shutil.rmtree(bundle)
    bundle.mkdir()


def lose_a_file(bundle: Path) -> None:
    (bundle / "language" / "decoder.onnx.data").unlink()


def cut_a_file(bundle: Path) -> None:
    file = bundle / "vision" / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-100])


def alter_the_tokenizer(bundle: Path) -> None:
    file = bundle / "processor" / "tokenizer.json"
    file.write_bytes(b"?" + file.read_bytes()[1:])


def alter_the_graph(bundle: Path) -> None:
    file = bundle / "vision" / "model.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)


def damage_the_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


def make_newer(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (make_absent, "is not a folder; give the folder that hivtp-export wrote"),
        (make_empty, "has no manifest.json; give the folder that hivtp-export wrote"),
        (lose_a_file, "lacks language/decoder.onnx.data; copy or export it again"),
        (cut_a_file, "it is truncated or altered: copy or export it again"),
        (alter_the_tokenizer, "tokenizer.json cannot be read as a tokenizer"),
        (alter_the_graph, "onnxruntime cannot load"),
        (damage_the_manifest, "not a manifest of hivtp"),
        (make_newer, f"has schema version 99, this hivtp reads {SCHEMA_VERSION}; upgrade hivtp"),
    ],
)
def test_a_damaged_bundle_is_one_line_and_exit_code_1(bundle, photo, damage: Callable[[Path], None], message):
    damage(bundle)
    assert message in refused(bundle, PROMPT, "--image", photo)


def test_an_altered_weight_is_found_where_hashes_are_checked(bundle, photo):
    file = bundle / "vision" / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "its sha256 differs from the manifest's" in refused(bundle, PROMPT, "--image", photo, "--check-hashes")


def test_an_encoder_bundle_cannot_answer(tiny_checkpoint, tmp_path):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportSettings(graph="encoder"), is_quiet=True).folder
    assert "holds the encoder graph alone and cannot answer" in refused(bundle, PROMPT)


def test_nan_in_the_scores_is_one_line_and_exit_code_1(bundle, photo):
    graph = onnx.load(bundle / "vision" / "model.onnx", load_external_data=False).graph
    weight = next(
        item for item in graph.initializer if item.name.startswith("vision.encoder.layers.2.self_attn.q_proj")
    )
    place = {entry.key: entry.value for entry in weight.external_data}
    with (bundle / "vision" / place["location"]).open("r+b") as file:
        file.seek(int(place.get("offset", 0)))
        file.write(np.full(int(place["length"]) // 4, np.nan, np.float32).tobytes())
    assert "scores of tile 0 hold NaN" in refused(bundle, PROMPT, "--image", photo)


def declare_png(width: int, height: int) -> bytes:
    """A PNG that declares any size and holds almost no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no image file"),
        (b"", "not an image, or a damaged one"),
        (b"these are words", "not an image, or a damaged one"),
        ("cut", "is truncated or damaged and cannot be decoded"),
        (declare_png(1, 1), "1 x 1 pixels are too few"),
        (declare_png(60_000, 50_000), "refused before decoding"),
        (declare_png(12_000, 9_000), "more than the 100000000 allowed"),
    ],
    ids=["absent", "empty", "text", "cut", "1x1", "billions of pixels", "too many pixels"],
)
def test_a_bad_image_is_one_line_and_exit_code_1(pruned_bundle, photo, tmp_path, content, message):
    file = tmp_path / "image.png"
    if content is not None:
        file.write_bytes(photo.read_bytes()[:100_000] if content == "cut" else content)
    assert message in refused(pruned_bundle, PROMPT, "--image", file)


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("", 0, "the prompt is empty"),
        ("   ", 1, "the prompt is empty"),
        ("what is in <image>", 0, "has 1 <image> marks and 0 images were given"),
        ("what", 2, "has 0 <image> marks and 2 images were given"),
        ("what " * 600, 0, "the context of this model holds 512"),
        ("<image>" * 17, 17, "the context of this model holds 512"),
    ],
)
def test_a_bad_prompt_is_one_line_and_exit_code_1(pruned_bundle, photo, prompt, num_images, message):
    assert message in refused(pruned_bundle, prompt, *["--image", photo] * num_images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 0], "max_new_tokens must be a whole number, 1 or more"),
        (["--temperature", -1], "temperature must be a finite number, 0 or more"),
        (["--temperature", "nan"], "temperature must be a finite number, 0 or more"),
        (["--top-p", 2], "top_p must be a number above 0 and at most 1"),
        (["--threads", 0], "num_threads must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_one_line_and_exit_code_1(pruned_bundle, options, message):
    assert message in refused(pruned_bundle, PROMPT, *options)


def test_an_overlay_that_cannot_be_written_is_refused_before_the_model_runs(pruned_bundle, photo, tmp_path):
    image = ["--image", photo]
    assert "--overlay needs an --image" in refused(pruned_bundle, PROMPT, "--overlay", tmp_path / "a.png")
    assert "is not a folder" in refused(pruned_bundle, PROMPT, *image, "--overlay", tmp_path / "absent" / "a.png")
    assert "ends in .png" in refused(pruned_bundle, PROMPT, *image, "--overlay", tmp_path / "a.picture")
    assert list(tmp_path.iterdir()) == []


def test_compiling_an_engine_that_compiles_nothing_is_refused(pruned_bundle, photo):
    message = refused(pruned_bundle, PROMPT, "--image", photo, "--vision-compile")
    assert "the engine auto compiles nothing: choose torch or torch-cuda, or no vision_compile" in message
