from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from hivtp.engines.manifest import SCHEMA_VERSION
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.main import main
from tests.support.command import hivtp_run, shell

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "What is in the picture?"


def one_line(code: int, output: str, errors: str) -> str:
    """The one line on stderr of a command that must fail before it writes anything."""
    assert code == 1, errors
    assert output == ""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("hivtp run: ")
    return lines[0]


def refused_by_the_command(*arguments: object) -> str:
    done = hivtp_run(*arguments)
    return one_line(done.returncode, done.stdout, done.stderr)


def refused(*arguments: object) -> str:
    """In this process, which takes a tenth of the time."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["run", *map(str, arguments)])
    return one_line(code, output.getvalue(), errors.getvalue())


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pruned_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("arguments", [[], ["bundle"], ["bundle", "what", "--max-new-tokens", "many"], ["--colour"]])
def test_wrong_usage_exits_with_2_and_the_usage(arguments):
    done = hivtp_run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: hivtp run")
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
        (make_absent, "is not a folder; give the folder that hivtp export wrote"),
        (make_empty, "has no manifest.json; give the folder that hivtp export wrote"),
        (lose_a_file, "language/decoder.onnx.data"),
        (cut_a_file, "it is truncated or altered"),
        (alter_the_tokenizer, "tokenizer.json cannot be used: it cannot be read as a tokenizer"),
        (alter_the_graph, "vision/model.onnx"),
        (damage_the_manifest, "not a manifest of hivtp"),
        (make_newer, f"has schema version 99, this hivtp reads {SCHEMA_VERSION}; upgrade hivtp"),
    ],
)
def test_a_damaged_bundle_is_one_line_and_exit_code_1(bundle, photo, damage: Callable[[Path], None], message):
    damage(bundle)
    assert message in refused_by_the_command(bundle, PROMPT, "--image", photo)


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
        (["--temperature", -1], "temperature must be None or a finite number, 0 or more"),
        (["--temperature", "nan"], "temperature must be None or a finite number, 0 or more"),
        (["--top-p", 2], "top_p must be None or a number above 0 and at most 1"),
        (["--threads", 0], "num_threads must be a whole number from 1 to 512, not 0"),
        (["--threads", 99999], "num_threads must be a whole number from 1 to 512, not 99999"),
        (["--top-k", -1], "top_k must be"),
        (["--repetition-penalty", 0], "repetition_penalty must be"),
        (["--stop", ""], "stop"),
        (["--max-tiles", 1], "max_tiles must be a whole number, 2 or more"),
        (["--max-tiles-per-run", 0], "max_tiles_per_run must be a whole number, 1 or more"),
        (["--language-backend", "transformers"], "needs a checkpoint"),
        (["--language-device", "moon"], "runs on one of auto, cpu, cuda, not on 'moon'"),
    ],
)
def test_a_setting_out_of_range_is_one_line_and_exit_code_1(pruned_bundle, options, message):
    assert message in refused(pruned_bundle, PROMPT, *options)


LONG = "a" * 5_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a.png", "absent is not a folder"),
        ("file/a.png", "file is not a folder"),
        ("a.picture", "ends in .png"),
        ("a", "ends in .png"),
        # Pillow knows these by name, and cannot write them, or not a drawing in colour.
        ("a.mpg", "ends in .png"),
        ("a.h5", "ends in .png"),
        ("a.grib", "ends in .png"),
        ("a.wmf", "ends in .png"),
        ("a.xbm", "ends in .png"),
        ("folder.png", "folder.png: it is not a file"),
        ("pipe.png", "pipe.png: it is not a file"),
        (f"{LONG}.png", "File name too long"),
        (f"{LONG}/a.png", "File name too long"),
    ],
)
def test_an_overlay_that_cannot_be_written_is_refused_before_the_model_runs(photo, tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.iterdir())
    # Nor is it loaded: there is none.
    assert message in refused(tmp_path / "nothing", PROMPT, "--image", photo, "--overlay", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_an_overlay_needs_an_image(tmp_path):
    assert "--overlay needs an --image" in refused(tmp_path, PROMPT, "--overlay", tmp_path / "a.png")


def test_a_disk_that_is_full_leaves_no_part_of_an_overlay(pruned_bundle, photo, tmp_path):
    """The answer is there."""
    script = 'ulimit -f 8; exec hivtp run "$1" what --image "$2" --max-new-tokens 1 --overlay "$3"'
    done = shell(script, pruned_bundle, photo, tmp_path / "a.png")
    assert done.returncode == 1
    assert "visual tokens  64 -> 32" in done.stdout
    assert done.stderr == f"hivtp run: cannot write {tmp_path / 'a.png'}: File too large\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bundle", "image"])
def test_paths_that_are_too_long_are_one_line_and_exit_code_1(photo, tmp_path, kind):
    if kind == "bundle":
        assert "File name too long" in refused(LONG, PROMPT, "--image", photo)
    else:
        assert "cannot be opened: File name too long" in refused(tmp_path, PROMPT, "--image", LONG)


def test_paths_that_hold_nul_are_one_line_and_exit_code_1(photo, tmp_path):
    """No command line can hold one, and a caller of the command can."""
    assert "cannot open the bundle a b" in refused("a\0b", PROMPT)
    assert "embedded null" in refused(tmp_path, PROMPT, "--image", "a\0b")
    assert "cannot write " in refused(tmp_path, PROMPT, "--image", photo, "--overlay", tmp_path / "a\0b.png")


def test_what_may_not_be_read_is_said_to_be_so(photo, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("changes the user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(photo, folder / "photo.png")
        (folder / "closed").mkdir(mode=0)
        (folder / "photo.png").chmod(0)
        monkeypatch.chdir(folder)
        os.seteuid(65534)
        try:
            for arguments, message in [
                (["--image", "photo.png"], "photo.png' cannot be opened: Permission denied"),
                (["--image", "closed/a.png"], "closed/a.png' cannot be opened: Permission denied"),
                (["--image", photo, "--overlay", "a.png"], "cannot write a.png: permission denied"),
                (["--image", photo, "--overlay", "photo.png"], "cannot write photo.png: permission denied"),
                (["--image", photo, "--overlay", "closed/a.png"], "cannot write closed/a.png: Permission denied"),
            ]:
                assert message in refused("nothing", PROMPT, *arguments)
        finally:
            os.seteuid(0)
            monkeypatch.undo()


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    """A line break or an escape code in a name stays in its line."""
    line = refused(tmp_path / "a\nhivtp run: fine\x1b[2J", PROMPT)
    assert "\x1b" not in line
    assert "a hivtp run: fine" in line
