"""The files that commands read and write: images, from pipes too, and drawings of the kept tokens."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.runtime.inputs.images import MAX_IMAGE_BYTES
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.model import Model
    from hivtp.runtime.vision.encoder import EncodedImage


def read_image(file: str) -> ImageSource:
    """An image of the command line: a path as it is, or the bytes of a pipe (`-`, `<(...)`), which can be read once.

    Raises:
        ImageError: the pipe cannot be read, or gives nothing.
    """
    if file == "-":
        return _read_pipe(sys.stdin.buffer, "standard input")
    try:
        if not stat.S_ISFIFO(Path(file).stat().st_mode):
            return file
        with open(file, "rb") as pipe:
            return _read_pipe(pipe, file)
    except (OSError, ValueError):
        # `load_image` says what is wrong with a path.
        return file


def _read_pipe(pipe: BinaryIO, name: str) -> bytes:
    content = pipe.read(MAX_IMAGE_BYTES + 1)
    if not content:
        raise ImageError(f"{name} gave no image: it ended at once")
    if len(content) > MAX_IMAGE_BYTES:
        raise ImageError(f"{name} gave more than {MAX_IMAGE_BYTES} bytes; give a smaller image")
    return content


def check_overlay(target: Path, images: Sequence[str]) -> None:
    """Refuse a drawing of the kept tokens that could not be written, before the model runs.

    Raises:
        ImageError: there is no image to draw on, or no folder to write to, or Pillow writes no such format.
    """
    from PIL import Image

    if not images:
        raise ImageError("--overlay needs an --image to draw on")
    try:
        is_folder = target.parent.is_dir()
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot write {target}: {error}") from error
    if not is_folder:
        raise ImageError(f"cannot write {target}: {target.parent} is not a folder")
    # Some formats are known by name and cannot be written, or not without another program.
    Image.init()
    kind = Image.registered_extensions().get(target.suffix.lower())
    if kind not in Image.SAVE or kind in ("MPEG", "HDF5", "GRIB", "BUFR", "WMF"):
        raise ImageError(f"cannot write {target}: no image format goes by that name; give a path that ends in .png")


def write_overlays(
    model: Model, encoded: Sequence[EncodedImage], images: Sequence[ImageSource], target: Path
) -> list[Path]:
    """Draw the kept tokens of each image: into `target`, or numbered beside it where there are several.

    Raises:
        ImageError: a drawing cannot be written.
    """
    from hivtp.runtime.inputs.images import load_image
    from hivtp.runtime.vision.overlay import draw_tiles

    manifest = model.bundle.manifest
    written = []
    for number, (image, kept) in enumerate(zip(images, encoded, strict=True), start=1):
        frames = model.images.frames(load_image(image))
        overlay = draw_tiles(frames, kept.tiles, manifest.vision.grid, manifest.pruning)
        path = target if len(images) == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        try:
            overlay.save(path)
        except Exception as error:  # encoders raise nearly anything
            raise ImageError(f"cannot write {path}: {error}; give a path that ends in .png") from error
        written.append(path)
    return written
