"""Anything that a caller may hand in as an image becomes one upright RGB picture, or an ImageError."""

from __future__ import annotations

import functools
import io
import os
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    import numpy.typing as npt

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"

MAX_IMAGE_PIXELS = 100_000_000
MIN_IMAGE_SIDE = 2
# Of an encoded file that is read from a pipe, whose size is not known before.
MAX_IMAGE_BYTES = 2**29

# Pillow reads many more, some of them through other programs (Ghostscript for EPS) or with decoders
# that few people exercise. The bytes may come from strangers, so only what people send is decoded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Turn a path, encoded bytes, a PIL image or an array into an upright RGB picture.

    The pixels are those of `transformers.image_utils.load_image`: EXIF orientation applied, then
    `convert("RGB")`, which drops an alpha channel. An animated file gives its first frame.

    Args:
        source: a path; the bytes of an encoded file in one of `FORMATS`; a PIL image, which is left as it
            is; or a uint8 array [height, width], or [height, width, channels] with 1, 3 or 4 channels.
        max_pixels: the most pixels that an image may declare; one with more is refused before decoding.

    Returns:
        An image of mode RGB, wholly decoded, which shares nothing with `source`.

    Raises:
        ImageError: if the source is missing, no image, damaged, too large, or under 2 pixels on a side.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(_as_bytes(source)), image_name(source), max_pixels)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fsdecode(source), max_pixels)
    raise ImageError(
        f"an image cannot be a {type(source).__name__}; expected a path, the bytes of an image file, "
        "a PIL image or a numpy array"
    )


def _as_bytes(source: bytes | bytearray | memoryview) -> bytes | bytearray:
    try:
        # A view need not lie in memory in a row, and may have been released.
        return source.tobytes() if isinstance(source, memoryview) else source
    except ValueError as error:
        raise ImageError(f"{image_name(source)} cannot be read: {error}") from error


def image_name(source: ImageSource) -> str:
    """How messages call an image: its path, or what it was given as."""
    if isinstance(source, Image.Image):
        return "the PIL image"
    if isinstance(source, np.ndarray):
        return f"the array of shape {list(source.shape)} and dtype {source.dtype}"
    if isinstance(source, bytes | bytearray | memoryview):
        return "the bytes given"
    path = os.fsdecode(source)
    # A path may be a whole data URL by mistake, which no message should repeat.
    return repr(path if len(path) <= 200 else path[:200] + "...")


def _from_path(path: str, max_pixels: int) -> Image.Image:
    name = image_name(path)
    if path.lower().startswith(("http://", "https://")):
        raise ImageError(f"URLs are not fetched: {name}; download the image and pass its path or its bytes")
    if os.path.isdir(path):
        raise ImageError(f"expected an image file, but {name} is a directory")
    if not os.path.isfile(path):
        raise ImageError(f"there is no image file {name}")
    try:
        file = open(path, "rb")  # noqa: SIM115 - the block below closes it
    except OSError as error:
        raise ImageError(f"the image file {name} cannot be opened: {error.strerror}") from error
    with file:
        return _decode(file, name, max_pixels)


def _from_pil(image: Image.Image, max_pixels: int) -> Image.Image:
    _check_size(image.size, image_name(image), max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{image_name(image)} cannot be decoded: {error}") from error


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    name = image_name(array)
    if array.dtype != np.uint8:
        raise ImageError(f"{name} is not an image; convert it to uint8 with values 0..255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ImageError(
            f"{name} is not an image; expected [height, width] or [height, width, channels] with 1, 3 or 4 "
            "channels, channels last"
        )
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    return _to_rgb(Image.fromarray(array))


def _decode(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=_available_formats())
    # Pillow warns above its own limit and raises above twice that; where warnings are errors, it raises
    # both. Silencing the warning would need the warning filters, which all threads share.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: refused before decoding, by Pillow's own limit: {error}") from error
    except MemoryError:
        raise
    # Decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        raise ImageError(
            f"{name}: not an image, or a damaged one; expected one of {', '.join(_available_formats())}"
        ) from error
    _check_size(image.size, name, max_pixels)
    try:
        # In place: a copy of a large photograph costs half as much as decoding it.
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(
            f"{name}: the {image.format} image is truncated or damaged and cannot be decoded: {error}"
        ) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if min(width, height) < MIN_IMAGE_SIDE:
        raise ImageError(
            f"{name}: {width} x {height} pixels are too few; expected at least {MIN_IMAGE_SIDE} on each side"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than the {max_pixels} allowed; "
            "scale the image down, or raise max_pixels if you trust it"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _available_formats() -> tuple[str, ...]:
    # Asking Pillow for a format that its build lacks is a KeyError there.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
