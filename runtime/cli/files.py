"""The files that commands read and write: images, from pipes too, and drawings of the kept tokens."""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import TYPE_CHECKING

from hivtp.runtime.inputs.images import MAX_IMAGE_BYTES
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
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
        if sys.stdin.isatty():
            raise ImageError("standard input is a terminal; pipe an image into it, or give a file")
        return _read_pipe(sys.stdin.buffer, "standard input")
    try:
        if not stat.S_ISFIFO(os.stat(file).st_mode):
            return file
        with open(file, "rb") as pipe:
            return _read_pipe(pipe, file)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        # `load_image` says what is wrong with a path.
        return file


def _read_pipe(pipe: BinaryIO, name: str) -> bytes:
    try:
        content = pipe.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    if not content:
        raise ImageError(f"{name} gave no image: it ended at once")
    if len(content) > MAX_IMAGE_BYTES:
        raise ImageError(f"{name} gave more than {MAX_IMAGE_BYTES} bytes; give a smaller image")
    return content


def check_images(images: Sequence[ImageSource]) -> None:
    """Refuse images that cannot be read, before the model is loaded.

    Raises:
        ImageError: see `load_image`.
    """
    from hivtp.runtime.inputs.images import load_image

    for image in images:
        load_image(image)


def check_overlay(target: Path, images: Sequence[str]) -> None:
    """Refuse a drawing of the kept tokens that could not be written, before the model is loaded.

    Raises:
        ImageError: there is no image to draw on, or no folder to write to, or Pillow writes no such format.
    """
    from PIL import Image

    if not images:
        raise ImageError("--overlay needs an --image to draw on")
    try:
        reason = _unwritable(target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise ImageError(f"cannot write {target}: {reason}")
    Image.init()
    try:
        # Some formats are known by name and cannot be written, or not in colour, or not without another program.
        Image.new("RGB", (8, 8)).save(io.BytesIO(), Image.registered_extensions()[target.suffix.lower()])
    except Exception as error:  # encoders raise nearly anything
        raise ImageError(
            f"cannot write {target}: Pillow writes no such image; give a path that ends in .png"
        ) from error


def _unwritable(target: Path) -> str | None:
    """Why a file cannot be written to a path, as far as that shows beforehand; None where it can.

    Raises:
        OSError, ValueError: the path cannot exist.
    """
    folder = target.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None if _may(folder, os.W_OK | os.X_OK) else "permission denied"
    if not stat.S_ISREG(mode):
        return "it is not a file"
    return None if _may(target, os.W_OK) else "permission denied"


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


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
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ImageError(f"cannot write {path}: {reason}") from error
        written.append(path)
    return written
