"""select: the HIVTP rule in numpy, which is its definition; every other form is tested against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp_ops.errors import ScoreError
from hivtp_ops.partition import region_ids, window_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp_ops.spec import PruningSpec

# In the order in which a patch is kept when `keep` sets an exact count.
GLOBAL, LOCAL, REST = range(3)


@dataclass(frozen=True)
class Selection:
    """Which patches of each tile are kept.

    Attributes:
        indices: [tiles, capacity] int64, raster indices in ascending order, then -1.
        counts: [tiles] int64, how many of a tile's indices are patches.
        is_global: [tiles, capacity] bool, True where the global stage kept the patch.
    """

    indices: NDArray[np.int64]
    counts: NDArray[np.int64]
    is_global: NDArray[np.bool_]


def select(
    importance: NDArray[np.floating],
    grid: tuple[int, int],
    spec: PruningSpec,
) -> Selection:
    """Apply the rule of HIVTP (arXiv 2509.23663) to every tile by itself.

    1. Order the patches by score, best first; of equal scores the lower raster index is the better.
       A patch whose score is -inf is never kept.
    2. Global stage: each region keeps its `floor(global_ratio * patches in region + 1e-6)` best.
    3. Local stage: each window keeps its best patch that the global stage did not keep, if it has one.
    4. Exact count, if `spec.keep` is set: order the patches by stage (global, local, rest) and within a stage
       as in 1, and keep the first `keep`. Too many thus drops the worst of the local stage, then of the
       global one; too few adds the best of the rest. Fewer than `keep` are kept where fewer are above -inf.
    5. Output in raster order.

    Args:
        importance: [tiles, patches] floating, patches in raster order. Other dtypes are converted to float32
            first, so that scores which differ by less are ties. +inf is a score like another.
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.

    Returns:
        The selection, of `spec.capacity(grid)` places per tile.

    Raises:
        ScoreError: `importance` has another shape, is not floating, or has NaN in it.
        SpecError: the spec does not fit the grid.
    """
    capacity = spec.capacity(grid)
    scores = _checked(importance, grid)
    indices = np.full((len(scores), capacity), -1, dtype=np.int64)
    counts = np.zeros(len(scores), dtype=np.int64)
    is_global = np.zeros((len(scores), capacity), dtype=np.bool_)
    for tile, tile_scores in enumerate(scores):
        # A stable sort leaves equal scores in raster order.
        best_first = np.argsort(-tile_scores, kind="stable")
        best_first = best_first[tile_scores[best_first] > -np.inf]
        stages = _stages(best_first, grid, spec)
        if spec.keep is None:
            kept = np.flatnonzero(stages != REST)
        else:
            by_stage = best_first[np.argsort(stages[best_first], kind="stable")]
            kept = np.sort(by_stage[: spec.keep])
        counts[tile] = len(kept)
        indices[tile, : len(kept)] = kept
        is_global[tile, : len(kept)] = stages[kept] == GLOBAL
    return Selection(indices, counts, is_global)


def _stages(best_first: NDArray[np.int64], grid: tuple[int, int], spec: PruningSpec) -> NDArray[np.int64]:
    """Give the stage that keeps each patch, [patches]; REST where none does."""
    stages = np.full(math.prod(grid), REST, dtype=np.int64)

    regions = region_ids(grid, spec.regions)[best_first]
    for region, quota in enumerate(spec.quotas(grid)):
        stages[best_first[regions == region][:quota]] = GLOBAL

    free = best_first[stages[best_first] != GLOBAL]
    # np.unique gives where each window occurs first, and that is its best patch.
    _, first_of_window = np.unique(window_ids(grid, spec.window)[free], return_index=True)
    stages[free[first_of_window]] = LOCAL
    return stages


def _checked(importance: NDArray[np.floating], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Give the scores as float32 once they are known to be scores."""
    scores = np.asarray(importance)
    rows, cols = grid
    if scores.ndim != 2 or scores.shape[1] != rows * cols:
        raise ScoreError(f"importance has shape {scores.shape}; a {rows} x {cols} grid takes [tiles, {rows * cols}]")
    if not np.issubdtype(scores.dtype, np.floating):
        raise ScoreError(f"importance is {scores.dtype}; give floating scores, float32 at best")
    if len(bad_tiles := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise ScoreError(
            f"importance of tile {bad_tiles[0]} has NaN in it ({len(bad_tiles)} of {len(scores)} tiles do); "
            "check the encoder's attention for overflow"
        )
    return scores.astype(np.float32, copy=False)
