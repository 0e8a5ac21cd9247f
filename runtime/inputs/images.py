"""Anything that a caller may hand in as an image becomes an upright RGB image, or an ImageError."""

from __future__ import annotations

import functools
import io
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from hivtp.engines.files import read_regular
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    import numpy.typing as npt

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"

MAX_IMAGE_PIXELS = 100_000_000
MIN_IMAGE_SIDE = 2
# Of an encoded file.
MAX_IMAGE_BYTES = 2**29

# Pillow reads many more, some of them through other programs (Ghostscript for EPS) or with decoders
# that few people exercise. The bytes may come from strangers, so only what people send is decoded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


# EXIF orientation: how the camera was held.
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Turn a path, encoded bytes, a PIL image or an array into an upright RGB image.

    All sources go one way, so the same image gives the same pixels however it comes, and they are those of
    `transformers.image_utils.load_image`: EXIF orientation is applied, then `convert("RGB")`, which drops an alpha
    channel. EXIF that is damaged turns nothing. A single colour that the file calls transparent stays in `info`; image
    processors put white in its place, as those of transformers do. An animated file gives its first frame.

    Args:
        source: a path; the bytes of an encoded file in one of `FORMATS`; a PIL image, which is left as it
            is; or a uint8 array [height, width], or [height, width, channels] with 1, 3 or 4 channels.
        max_pixels: the most pixels that an image may declare; one with more is refused before decoding.

    Returns:
        An image of mode RGB, wholly decoded, which shares nothing with `source`.

    Raises:
        ImageError: the source is missing, cannot be opened, is not an image, is damaged, too large, or under 2 pixels
            on a side.
        MemoryError: memory ran out.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray):
        raise ImageError(
            f"an image cannot be a {type(source).__name__}; expected a path, the bytes of an image file, "
            "a PIL image or a numpy array"
        )
    try:
        name = image_name(source)
    # A path object of somebody's own.
    except Exception as error:
        raise ImageError(f"an image cannot be this {type(source).__name__}, which is not a path: {error}") from error
    if isinstance(source, Image.Image):
        return _from_pil(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    content = _read(source, name) if isinstance(source, str | os.PathLike) else _bytes_of(source, name)
    return _decode(io.BytesIO(content), name, max_pixels)


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


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    """The content of a file. A pipe would block, and only the command line reads pipes."""
    path = os.fsdecode(path)
    if path.lower().startswith(("http://", "https://")):
        raise ImageError(f"URLs are not fetched: {name}; download the image and pass its path or its bytes")
    if path.lower().startswith("data:"):
        raise ImageError(f"data URLs are not decoded: {name}; decode it and pass the bytes")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"expected an image file, but {name} is a directory")
        if not stat.S_ISREG(mode):
            raise ImageError(f"expected an image file, but {name} is a pipe or a device; read it and pass the bytes")
        return read_regular(Path(path), MAX_IMAGE_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"there is no image file {name}") from error
    # A path that holds NUL, or a lone surrogate, is a ValueError.
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"the image file {name} cannot be opened: {reason}") from error


def _bytes_of(source: bytes | bytearray | memoryview, name: str) -> bytes:
    try:
        return bytes(source)
    except (ValueError, BufferError, TypeError) as error:
        raise ImageError(f"{name} cannot be read: {error}") from error


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    try:
        _check_size(image.size, name, max_pixels)
        found = _upright_rgb(image)
        return _without_odd_info(image.copy() if found is image else found)
    except (ImageError, MemoryError):
        raise
    # Whatever somebody did to an image object can raise nearly anything.
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def _from_array(array: npt.NDArray[np.uint8], name: str, max_pixels: int) -> Image.Image:
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
    # The image of an array shares its memory.
    return Image.fromarray(array).convert("RGB")


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
        # Nothing else holds it, so it is not copied: that would cost half as much as decoding a large photograph.
        return _without_odd_info(_upright_rgb(image))
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


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB; itself where it is both."""
    image.load()
    method = _transposition(image)
    if method is not None:
        image = image.transpose(method)
    return image if image.mode == "RGB" else image.convert("RGB")


def _transposition(image: Image.Image) -> Image.Transpose | None:
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    # Damaged EXIF raises nearly anything, and the pixels are whole.
    except Exception:  # noqa: BLE001
        return None


def _without_odd_info(image: Image.Image) -> Image.Image:
    """Keep of what a file says beside its pixels only a transparent colour."""
    colour = image.info.get("transparency")
    is_colour = (
        isinstance(colour, tuple)
        and len(colour) == 3
        and all(isinstance(level, int) and 0 <= level < 2**16 for level in colour)
    )
    image.info = {"transparency": colour} if is_colour else {}
    return image


@functools.cache
def _available_formats() -> tuple[str, ...]:
    # Asking Pillow for a format that its build lacks is a KeyError there.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
