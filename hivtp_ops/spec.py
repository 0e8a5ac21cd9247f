"""PruningSpec: the settings of the HIVTP rule, and its presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import SpecError
from hivtp_ops.partition import region_ids, window_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# Of CLIP ViT-L/14 at 336 pixels, whose layers the paper chose.
PAPER_GRID = (24, 24)
PAPER_LAYERS = 24


@dataclass(frozen=True)
class PruningSpec:
    """Settings of the HIVTP rule (arXiv 2509.23663); the defaults are the paper's.

    Attributes:
        first_layer: first scoring layer of the vision encoder, 0-based; None is the paper's 6 of 24,
            scaled to the encoder's depth.
        num_layers: number of scoring layers; None is the paper's 3 of 24, scaled to the encoder's depth.
        regions: regions along each axis of the grid.
        global_ratio: share of each region's patches that the global stage keeps, 0 to 1.
        window: side of a window of the local stage, in patches.
        keep: exact number of patches to keep; None keeps what the two stages give, which varies.

    Raises:
        SpecError: a setting has the wrong type or lies outside its range.
    """

    first_layer: int | None = None
    num_layers: int | None = None
    regions: int = 2
    global_ratio: float = 0.25
    window: int = 2
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.first_layer is not None:
            _check_int("first_layer", self.first_layer, minimum=0)
        if self.num_layers is not None:
            _check_int("num_layers", self.num_layers, minimum=1)
        if self.keep is not None:
            _check_int("keep", self.keep, minimum=1)
        _check_int("regions", self.regions, minimum=1)
        _check_int("window", self.window, minimum=1)
        # Written so that NaN fails too.
        is_number = isinstance(self.global_ratio, int | float) and not isinstance(self.global_ratio, bool)
        if not (is_number and 0.0 <= self.global_ratio <= 1.0):
            raise SpecError(f"global_ratio must be a number from 0 to 1, not {self.global_ratio!r}")

    @classmethod
    def preset(cls, name: str, grid: tuple[int, int] = PAPER_GRID) -> PruningSpec:
        """Give a preset, fitted to a grid.

        The number in a preset's name is what it keeps of 24 x 24; another grid keeps the same share of its
        patches, rounded, with ratio and window unchanged.

        Args:
            name: a key of PRESETS.
            grid: rows and columns of patches.

        Raises:
            SpecError: there is no such preset, or it does not fit the grid.
        """
        if name not in PRESETS:
            raise SpecError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
        spec = PRESETS[name]
        rows, cols = _checked_grid(grid)
        if spec.keep is not None:
            share = spec.keep / math.prod(PAPER_GRID)
            spec = replace(spec, keep=max(1, round(share * rows * cols)))
        try:
            spec.validate(grid)
        except SpecError as error:
            raise SpecError(f"preset {name!r} does not fit: {error}") from error
        return spec

    def resolve(self, num_encoder_layers: int) -> PruningSpec:
        """Fill in the scoring layers for an encoder, and check that it has them.

        Args:
            num_encoder_layers: whole depth of the encoder, including layers after the one whose features are
                kept.

        Returns:
            The spec with `first_layer` and `num_layers` set.

        Raises:
            SpecError: the layers lie outside the encoder.
        """
        _check_int("num_encoder_layers", num_encoder_layers, minimum=1)
        first, count = self.first_layer, self.num_layers
        if first is None:
            first = round(6 * num_encoder_layers / PAPER_LAYERS)
        if count is None:
            count = max(1, round(3 * num_encoder_layers / PAPER_LAYERS))
        if first + count > num_encoder_layers:
            raise SpecError(
                f"scoring layers {first} to {first + count - 1} lie outside the encoder, whose layers are "
                f"0 to {num_encoder_layers - 1}; set first_layer and num_layers so that their sum is at most "
                f"{num_encoder_layers}"
            )
        return replace(self, first_layer=first, num_layers=count)

    @property
    def scoring_layers(self) -> range:
        """The 0-based encoder layers whose attention is read; the spec is a resolved one."""
        assert self.first_layer is not None, "resolve sets the layers"
        assert self.num_layers is not None, "resolve sets the layers"
        return range(self.first_layer, self.first_layer + self.num_layers)

    def validate(self, grid: tuple[int, int]) -> None:
        """Check that the spec works on a grid.

        Args:
            grid: rows and columns of patches.

        Raises:
            SpecError: the grid is not two whole numbers, or is smaller than the regions, a window or `keep` need.
        """
        rows, cols = _checked_grid(grid)
        for name in ("regions", "window"):
            if getattr(self, name) > min(rows, cols):
                raise SpecError(
                    f"{name} is {getattr(self, name)}, larger than the {rows} x {cols} grid; "
                    f"use at most {min(rows, cols)}"
                )
        if self.keep is not None and self.keep > rows * cols:
            raise SpecError(
                f"keep is {self.keep}, more than the {rows * cols} patches of the {rows} x {cols} grid; "
                f"use at most {rows * cols}"
            )

    def quotas(self, grid: tuple[int, int]) -> NDArray[np.int64]:
        """Give how many patches the global stage keeps in each region.

        Args:
            grid: rows and columns of patches.

        Returns:
            [regions * regions] int64, regions in raster order; `floor(global_ratio * n + 1e-6)` of n patches.

        Raises:
            SpecError: the spec does not fit the grid.
        """
        self.validate(grid)
        sizes = np.bincount(region_ids(grid, self.regions))
        # 1e-6 undoes the rounding of a ratio such as 32/144, which must give 32 of 144.
        quotas: NDArray[np.int64] = np.floor(self.global_ratio * sizes + 1e-6).astype(np.int64)
        return quotas

    def capacity(self, grid: tuple[int, int]) -> int:
        """Give the static size of the output: `keep`, or the most that the two stages can keep.

        Args:
            grid: rows and columns of patches.

        Raises:
            SpecError: the spec does not fit the grid.
        """
        self.validate(grid)
        if self.keep is not None:
            return self.keep
        num_global = int(self.quotas(grid).sum())
        num_windows = int(window_ids(grid, self.window).max()) + 1
        return num_global + min(num_windows, math.prod(grid) - num_global)

    def to_dict(self) -> dict[str, Any]:
        """Give the settings by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PruningSpec:
        """Read what `to_dict` gave.

        Args:
            settings: every setting by name.

        Raises:
            SpecError: a setting is unknown, missing or not valid.
        """
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - names):
            raise SpecError(f"unknown pruning settings {unknown}; there are {sorted(names)}")
        if missing := sorted(names - set(settings)):
            raise SpecError(f"missing pruning settings {missing}")
        return cls(**settings)


def _check_int(name: str, value: object, minimum: int) -> None:
    # bool is a subclass of int, and True would pass for 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise SpecError(f"{name} must be a whole number of at least {minimum}, not {value!r}")


def _checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    if len(grid) != 2:
        raise SpecError(f"a grid is (rows, columns), not {grid!r}")
    rows, cols = grid
    _check_int("rows of the grid", rows, minimum=1)
    _check_int("columns of the grid", cols, minimum=1)
    return rows, cols


# The numbers are exact counts on PAPER_GRID, whose regions have 144 patches each.
PRESETS: Mapping[str, PruningSpec] = MappingProxyType(
    {
        "paper": PruningSpec(),
        "288": PruningSpec(window=2, global_ratio=36 / 144, keep=288),
        "192": PruningSpec(window=3, global_ratio=32 / 144, keep=192),
        "128": PruningSpec(window=3, global_ratio=16 / 144, keep=128),
        "64": PruningSpec(window=4, global_ratio=7 / 144, keep=64),
    }
)
