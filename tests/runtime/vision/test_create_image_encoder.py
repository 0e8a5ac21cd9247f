"""The encoder that a bundle asks for, and bundles whose parts do not belong together."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from hivtp_ops.errors import BundleError, HivtpError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.runtime.vision.cache import CachedEncoder
    from hivtp.runtime.vision.encoder import EncodedImage

    OpenEncoder = Callable[..., CachedEncoder]

SETTINGS = "processor/image_processor.json"


def edited(folder: Path, file: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle with a changed file, and a manifest that knows its new size."""
    content = json.loads((folder / file).read_text())
    edit(content)
    return replaced(folder, file, json.dumps(content).encode())


def replaced(folder: Path, file: str, content: bytes) -> Path:
    (folder / file).write_bytes(content)
    if file != "manifest.json":
        edited(folder, "manifest.json", lambda manifest: manifest["files"][file].update(num_bytes=len(content)))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("manifest.json", {"family": "llava"}, "its family is 'llava', and it has a tiling"),
        ("manifest.json", {"tiling": None}, "its family is 'llava_next', and it has no tiling"),
        ("manifest.json", {"family": "qwen"}, "its family is 'qwen'"),
        ("manifest.json", {"pruning": None}, r"vision graph of .* prunes|are not those that the manifest says"),
        (SETTINGS, {"image_grid_pinpoints": [[64, 100]]}, r"pinpoints\[0\] is \(64, 100\)"),
        (SETTINGS, {"image_grid_pinpoints": []}, "image_grid_pinpoints is"),
        (SETTINGS, {"image_grid_pinpoints": {"a": 1}}, "image_grid_pinpoints is"),
        (SETTINGS, {"image_grid_pinpoints": [[64, 64]]}, "its pinpoints are .* manifest's"),
        (SETTINGS, {"image_processor_type": "CLIPImageProcessor"}, "the image processor of this checkpoint is 'CLIP"),
        (SETTINGS, {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}, "32 x 32"),
    ],
)
def test_a_bundle_whose_tiling_is_damaged_is_refused(
    next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = edited(shutil.copytree(next_bundle, tmp_path / "bundle"), file, lambda content: content.update(changes))
    with pytest.raises(BundleError, match=message):
        open_encoder(folder)


def test_tiles_have_no_prefix_tokens(next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    edited(folder, "manifest.json", lambda manifest: manifest["vision"].update(num_prefix_tokens=1))
    with pytest.raises(BundleError, match=r"prefix tokens|are not those that the manifest says"):
        open_encoder(folder)


def test_the_preprocessing_makes_what_the_graph_takes(
    pruned_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder
) -> None:
    folder = shutil.copytree(pruned_bundle, tmp_path / "bundle")
    edited(folder, SETTINGS, lambda settings: settings.update(crop_size={"height": 60, "width": 64}))
    with pytest.raises(BundleError, match="makes images of 60 x 64 pixels, and the vision graph takes 64 x 64"):
        open_encoder(folder)


def test_a_bundle_that_does_not_prune_as_it_says_is_refused(
    unpruned_bundle: Path, pruned_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder
) -> None:
    folder = shutil.copytree(unpruned_bundle, tmp_path / "bundle")
    other = json.loads((pruned_bundle / "manifest.json").read_text())
    changes = {"pruning": other["pruning"]}
    edited(folder, "manifest.json", lambda manifest: manifest.update(changes))
    edited(folder, "manifest.json", lambda manifest: manifest["vision"].update(capacity=other["vision"]["capacity"]))
    with pytest.raises(BundleError, match=r"does not prune|are not those that the manifest says"):
        open_encoder(folder)


def npy(values: np.ndarray, shape: str = "", dtype: str = "") -> bytes:
    """The content of a .npy file, which may declare another shape and dtype."""
    header = {"descr": dtype or values.dtype.str, "fortran_order": False, "shape": shape or values.shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    content = file.getvalue().replace(f"'{shape}'".encode(), shape.encode()) if shape else file.getvalue()
    return content.ljust(len(file.getvalue()))[: len(file.getvalue()) - 1] + b"\n" + values.tobytes()


def test_a_newline_is_read_as_it_was_written(next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    file = json.loads((folder / "manifest.json").read_text())["tiling"]["newline_file"]
    newline = np.load(folder / file)
    assert npy(newline) == (folder / file).read_bytes()
    image = encode(open_encoder(folder))
    assert (image.embeds == newline).all(axis=1).any()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY\x03\x00",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535,
        npy(np.zeros(63, np.float32)),
        npy(np.zeros((1, 64), np.float32)),
        npy(np.zeros(64, np.float32))[:-1],
        npy(np.zeros(64, np.float32), shape="(10000000000000,)"),
        npy(np.zeros(64, np.float32), dtype="|O"),
        npy(np.zeros(64, np.float32), shape="__import__(0)"),
    ],
)
def test_a_damaged_newline_is_refused(
    next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder, content: bytes
) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    file = json.loads((folder / "manifest.json").read_text())["tiling"]["newline_file"]
    with pytest.raises(BundleError, match="newline"):
        open_encoder(replaced(folder, file, content))


def test_a_budget_below_what_the_rule_can_give_is_refused(
    next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder
) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    edited(folder, "manifest.json", lambda manifest: manifest["tiling"].update(keep_total=3))
    with pytest.raises((BundleError, SpecError), match="base tile"):
        encode(open_encoder(folder))


def encode(encoder: CachedEncoder) -> EncodedImage:
    [image] = encoder.encode([encoder.prepare(Image.new("RGB", (128, 64)))])
    return image


@pytest.mark.parametrize("changes", [{"keep_total": 10**6}, {"min_for_base": 10**6}, {"newline": "some"}])
def test_any_tiling_gives_tokens_or_an_error_of_ours(
    next_bundle: Path, tmp_path: Path, open_encoder: OpenEncoder, changes: dict[str, Any]
) -> None:
    folder = shutil.copytree(next_bundle, tmp_path / "bundle")
    edited(folder, "manifest.json", lambda manifest: manifest["tiling"].update(changes))
    try:
        image = encode(open_encoder(folder))
    except HivtpError:
        return
    assert len(image.embeds)
