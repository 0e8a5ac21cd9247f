"""Profiles: the numbers of tiles that a plan is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a number of tiles; far more than any GPU has memory for.
MAX_DIGITS = 6


@dataclass(frozen=True)
class TileProfile:
    """The tiles of one run: fewest, the number that speed is tuned for, most."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise EngineError(f"a profile of {self} tiles cannot be; write fewest:usual:most, rising from 1 or more")

    @classmethod
    def parse(cls, text: str) -> TileProfile:
        """Read "1:1:5", or "5" for always five.

        Raises:
            EngineError: it is neither, or the numbers fall.
        """
        parts = text.split(":")
        are_numbers = all(part.isdecimal() and part.isascii() and len(part) <= MAX_DIGITS for part in parts)
        if len(parts) not in (1, 3) or not are_numbers:
            raise EngineError(
                f"{text[:40]!r} is not a profile of tiles; write fewest:usual:most, as in 1:1:5, or one number, "
                f"with at most {MAX_DIGITS} digits each"
            )
        numbers = [int(part) for part in parts]
        return cls(*numbers) if len(numbers) == 3 else cls(*numbers * 3)

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


def check_profiles(profiles: Sequence[TileProfile]) -> None:
    """Refuse profiles that leave a number of tiles out, from 1 up to the largest.

    Raises:
        EngineError: there are no profiles, or the number of tiles that is missing.
    """
    if not profiles:
        raise EngineError("a plan needs at least one profile of tiles")
    # The first number of a gap follows the largest of a profile, or is 1.
    for num_tiles in sorted({1, *(profile.maximum + 1 for profile in profiles)}):
        if num_tiles <= max_tiles(profiles) and find_profile(profiles, num_tiles) is None:
            found = ", ".join(map(str, profiles))
            raise EngineError(f"the profiles {found} leave out {num_tiles} tiles; add {num_tiles} to one of them")


def max_tiles(profiles: Sequence[TileProfile]) -> int:
    """The largest number of tiles of one run."""
    return max(profile.maximum for profile in profiles)


def find_profile(profiles: Sequence[TileProfile], num_tiles: int) -> int | None:
    """The index of the narrowest profile that takes this many tiles, the first of several; None where none does."""
    fitting = [
        (profile.maximum - profile.minimum, abs(profile.optimum - num_tiles), index)
        for index, profile in enumerate(profiles)
        if profile.minimum <= num_tiles <= profile.maximum
    ]
    return min(fitting)[2] if fitting else None
