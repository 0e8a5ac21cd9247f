"""Encoded bytes of a stranger to an image: only formats that people send, bounded before anything is decoded."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from hivtp.runtime.inputs.images import MIN_IMAGE_SIDE, load_image
from hivtp.runtime.serving.protocol.errors import invalid
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

# Narrower than what `load_image` takes of the operator's own files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode_image(content: bytes, param: str, max_pixels: int) -> Image.Image:
    """An upright RGB image.

    Args:
        content: an encoded file; of an animation the first frame counts.
        param: where the image stands in the request.
        max_pixels: that it may declare.

    Raises:
        ApiError: it is not an image of one of `FORMATS`, or damaged, or too large, or next to nothing.
    """
    read_size(content, param, max_pixels)
    try:
        return load_image(content, max_pixels=max_pixels)
    except ImageError as error:
        raise invalid(f"{param}: {error}", param, "invalid_image") from error


def read_size(content: bytes, param: str, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the upright image, from the file's header alone; see `decode_image`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            # Four of the eight orientations lie on their side.
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except MemoryError:
        raise
    # Decoders raise nearly anything on damaged data; Pillow's own bound on pixels is an exception, too.
    except Exception as error:
        wanted = ", ".join(FORMATS)
        message = f"{param}: not an image, or a damaged one; send one of {wanted}"
        raise invalid(message, param, "invalid_image") from error
    if min(width, height) < MIN_IMAGE_SIDE:
        message = f"{param}: {width} x {height} pixels are too few; send at least {MIN_IMAGE_SIDE} on each side"
        raise invalid(message, param, "invalid_image")
    if width * height > max_pixels:
        message = f"{param}: {width} x {height} pixels are more than the {max_pixels} allowed; scale the image down"
        raise invalid(message, param, "image_too_large")
    return (width, height) if is_turned else (height, width)
