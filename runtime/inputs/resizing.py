"""How large an image is resized, in the forms that a checkpoint may say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Edges:
    """The shorter side becomes `shortest`, or less where the longer one would exceed `longest`."""

    shortest: int
    longest: int

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, as transformers rounds it."""
        short, long = min(height, width), max(height, width)
        side: float = self.shortest
        length = self.shortest
        if long / short * self.shortest > self.longest:
            side = self.longest * short / long
            length = round(side)
        if short == length:
            return height, width
        if width < height:
            return int(side * height / width), length
        return length, int(side * width / height)


@dataclass(frozen=True)
class Box:
    """The image becomes as large as fits."""

    max_height: int
    max_width: int

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, as transformers rounds it."""
        scale = min(self.max_height / height, self.max_width / width)
        return int(height * scale), int(width * scale)


# An int is the length of the shorter side, a tuple is (height, width).
Size: TypeAlias = int | tuple[int, int] | Edges | Box


def read_size(size: Any, *, is_square: bool) -> Any:
    """Bring a size as it stands in a config to an int (the shorter side), (height, width), Edges or Box.

    Args:
        size: anything; what is none of the forms is returned as it is.
        is_square: whether a number alone is both sides.
    """
    match size:
        case {"shortest_edge": length, **rest} if not rest:
            return length
        case {"shortest_edge": shortest, "longest_edge": longest, **rest} if not rest:
            return Edges(shortest, longest)
        case {"max_height": max_height, "max_width": max_width, **rest} if not rest:
            return Box(max_height, max_width)
        case {"height": height, "width": width, **rest} if not rest:
            return height, width
        case int() if is_square:
            return size, size
    return tuple(size) if isinstance(size, list) else size
