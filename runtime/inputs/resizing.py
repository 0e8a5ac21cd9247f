"""To what size an image is resized, in the forms that the image processors of transformers know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

# In pixels, of what an image is resized or cropped to; a square of it has 100 megapixels.
MAX_SIDE = 10_000


@dataclass(frozen=True)
class UpTo:
    """The shorter side gets a length, or less where the longer one would exceed its bound.

    Attributes:
        shorter: length of the shorter side in pixels.
        longer: the most that the longer side may have.
    """

    shorter: int
    longer: int


@dataclass(frozen=True)
class Within:
    """As large as fits into a rectangle, in the image's own shape.

    Attributes:
        height, width: of the rectangle in pixels.
    """

    height: int
    width: int


# The length of the shorter side; or (height, width), which may change the shape; or bounds.
Size: TypeAlias = int | tuple[int, int] | UpTo | Within


def read_size(value: Any, *, is_square: bool) -> Any:
    """Bring the forms that a size has on the hub to a Size, or leave it as it is.

    Args:
        value: of a `preprocessor_config.json`.
        is_square: an int is both height and width.
    """
    match value:
        case {"shortest_edge": length, **rest} if not rest and not is_square:
            return length
        case {"shortest_edge": shorter, "longest_edge": longer, **rest} if not rest and not is_square:
            return UpTo(shorter, longer)
        case {"max_height": height, "max_width": width, **rest} if not rest and not is_square:
            return Within(height, width)
        case {"height": height, "width": width, **rest} if not rest:
            return height, width
        case int() if is_square:
            return value, value
        case [*lengths]:
            return tuple(lengths)
    return value


def is_size(value: object) -> bool:
    """Whether a value is a Size that an image can have."""
    match value:
        case UpTo(shorter, longer):
            return is_length(shorter) and is_length(longer)
        case Within(height, width):
            return is_length(height) and is_length(width)
    return is_length(value) or is_height_width(value)


def is_height_width(value: object) -> bool:
    """Whether a value is (height, width) in pixels."""
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_length, value))


def is_length(value: object) -> bool:
    """Whether a value is a number of pixels that a side can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIDE


def resized_size(image_size: tuple[int, int], size: Size) -> tuple[int, int]:
    """The (height, width) that an image of this (height, width) is resized to.

    As in transformers operation by operation, since floats decide the last pixel. Of a very long and thin image a side
    may become 0.
    """
    height, width = image_size
    short, long = sorted(image_size)
    match size:
        case tuple():
            return size
        case Within():
            scale = min(size.height / height, size.width / width)
            return int(height * scale), int(width * scale)
        case UpTo() if long / short * size.shorter > size.longer:
            exact = size.longer * float(short) / float(long)
            shorter = round(exact)
            if short == shorter:
                return image_size
            longer = int(exact * long / short)
        case _:
            shorter = size if isinstance(size, int) else size.shorter
            longer = int(shorter * long / short)
    return (longer, shorter) if width <= height else (shorter, longer)
