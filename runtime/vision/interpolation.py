"""The smaller view that LLaVA-OneVision makes of many tiles, and which of its cells are left after pruning.

Unpruned, the view of an image beyond a number of tiles is interpolated: a cell is the mean of the four patches around
its middle, by bilinear weights. Pruned, a cell is the mean of those of its patches that were kept, by the same weights;
it is left where these have at least half of the weight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout

_ASPECT_RATIO = re.compile(r"^anyres_max_([1-9][0-9]{0,2})$")
# A view that is larger by less stays as it is.
MIN_RATIO = 1.1
# Half, less what float32 may lose of it.
MIN_WEIGHT = 0.4999


@dataclass(frozen=True)
class Cells:
    """The cells of an interpolated view that are left.

    Attributes:
        is_kept: [rows, cols] bool.
        sources: [cells, 4] int64, which of the kept patches each is made of; where one was dropped, any.
        weights: [cells, 4] float32, which sum to one; 0 for a patch that was dropped.
    """

    is_kept: NDArray[np.bool_]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32]

    def mean(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The means [cells, ...] of values [kept patches, ...]."""
        shape = (-1, *[1] * (values.ndim - 1))
        total = np.zeros((len(self.sources), *values.shape[1:]), np.float32)
        for sources, weights in zip(self.sources.T, self.weights.T, strict=True):
            total += values[sources] * weights.reshape(shape)
        return total

    def best(self, importance: NDArray[np.float32], max_cells: int) -> Cells:
        """At most this many cells: those whose patches have the highest mean importance, of equals the first.

        Args:
            importance: [kept patches] float32.
            max_cells: how many.
        """
        if len(self.sources) <= max_cells:
            return self
        order = np.argsort(-self.mean(importance), kind="stable")[:max_cells]
        chosen = np.sort(order)
        is_kept = np.zeros_like(self.is_kept)
        is_kept.flat[np.flatnonzero(self.is_kept)[chosen]] = True
        return Cells(is_kept, self.sources[chosen], self.weights[chosen])


def max_view_tiles(config: Any) -> int | None:
    """How many tiles' patches a view may have before it is interpolated, by a model's config; None where none is."""
    match = _ASPECT_RATIO.match(str(getattr(config, "vision_aspect_ratio", "")))
    return None if match is None else int(match[1])


def view_size(layout: TileLayout, grid: tuple[int, int], max_tiles: int | None) -> tuple[int, int]:
    """Rows and columns of the view of an image's tile grid, as the model sees it.

    As in transformers operation by operation, since floats decide the last row.

    Args:
        layout: how the image lies on the tiles.
        grid: rows and columns of patches in one tile.
        max_tiles: a view of more patches than this many tiles have is made smaller; None where none is.
    """
    rows, cols = layout.patch_rows(grid), layout.patch_cols(grid)
    num_rows, num_cols = (len(range(part.start, part.stop)) for part in (rows, cols))
    if max_tiles is None:
        return num_rows, num_cols
    ratio = math.sqrt(num_rows * num_cols / (max_tiles * grid[0] ** 2))
    if ratio <= MIN_RATIO:
        return num_rows, num_cols
    return int(num_rows // ratio), int(num_cols // ratio)


def interpolated(places: NDArray[np.int64], size: tuple[int, int]) -> Cells:
    """The cells of a view of a smaller size.

    Args:
        places: [rows, cols] int64, the number of a patch among those that were kept, -1 where it was dropped.
        size: rows and columns of cells.
    """
    (first_row, last_row, down), (first_col, last_col, across) = map(_neighbours, places.shape, size)
    rows = np.stack([first_row, first_row, last_row, last_row], axis=-1)[:, None, :]
    cols = np.stack([first_col, last_col, first_col, last_col], axis=-1)[None, :, :]
    one = np.float32(1)
    by_row = np.stack([one - down, one - down, down, down], axis=-1)[:, None, :]
    by_col = np.stack([one - across, across, one - across, across], axis=-1)[None, :, :]
    sources = places[rows, cols]
    weights = by_row * by_col * (sources >= 0)
    total = weights.sum(axis=-1)
    is_kept = total >= MIN_WEIGHT
    kept = weights[is_kept] / total[is_kept][:, None]
    return Cells(is_kept, np.maximum(sources[is_kept], 0), kept.astype(np.float32))


def _neighbours(length: int, num_cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The two patches around the middle of each cell, along an axis, and the weight of the second."""
    scale = np.float32(length) / np.float32(num_cells)
    half = np.float32(0.5)
    middles = np.maximum((np.arange(num_cells, dtype=np.float32) + half) * scale - half, np.float32(0))
    first = np.minimum(middles.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), middles - first.astype(np.float32)
