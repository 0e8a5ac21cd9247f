"""Pictures from files, upright and RGB, as transformers' own processors take them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image


def read_pictures(files: Sequence[str | Path]) -> list[Image]:
    """Read picture files.

    Raises:
        ImageError: there is none, or one cannot be read.
    """
    from PIL import Image, ImageOps

    if not files:
        raise ImageError("no pictures were given; give files of pictures like those that the model is meant for")
    pictures = []
    for file in files:
        if not Path(file).is_file():
            raise ImageError(f"there is no picture file {file}")
        try:
            with Image.open(file) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise ImageError(f"{file} is no picture, or a damaged one: {error}") from error
    return pictures
