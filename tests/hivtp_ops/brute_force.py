"""The rule once more, in plain lists and in the words of the paper; and maps that are hard on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hivtp_ops import PRESETS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

INF = float("inf")
PAPER_GRID = (24, 24)


def lower_index_wins(score: float, index: int) -> tuple[float, int]:
    return (-score, index)


def higher_index_wins(score: float, index: int) -> tuple[float, int]:
    """A tie rule that is wrong on purpose, to show that the tests see the difference."""
    return (-score, -index)


def prune_tile(
    scores: list[float],
    grid: tuple[int, int],
    spec: PruningSpec,
    sort_key: Callable[[float, int], tuple[float, int]] = lower_index_wins,
) -> tuple[list[int], set[int]]:
    """Give the kept patches of one tile in raster order, and those of them that the global stage kept."""
    rows, cols = grid

    def goodness(index: int) -> tuple[float, int]:
        return sort_key(scores[index], index)

    global_stage: list[int] = []
    for i in range(spec.regions):
        for j in range(spec.regions):
            region = [
                row * cols + col
                for row in range(i * rows // spec.regions, (i + 1) * rows // spec.regions)
                for col in range(j * cols // spec.regions, (j + 1) * cols // spec.regions)
            ]
            quota = math.floor(spec.global_ratio * len(region) + 1e-6)
            alive = [index for index in region if scores[index] != -INF]
            global_stage += sorted(alive, key=goodness)[:quota]

    local_stage: list[int] = []
    for top in range(0, rows, spec.window):
        for left in range(0, cols, spec.window):
            candidates = [
                row * cols + col
                for row in range(top, min(top + spec.window, rows))
                for col in range(left, min(left + spec.window, cols))
            ]
            candidates = [c for c in candidates if c not in global_stage and scores[c] != -INF]
            if candidates:
                local_stage.append(min(candidates, key=goodness))

    if spec.keep is not None:
        for stage in (local_stage, global_stage):
            while stage and len(global_stage) + len(local_stage) > spec.keep:
                stage.remove(max(stage, key=goodness))
        rest = [
            index
            for index in range(rows * cols)
            if index not in global_stage and index not in local_stage and scores[index] != -INF
        ]
        num_missing = spec.keep - len(global_stage) - len(local_stage)
        local_stage += sorted(rest, key=goodness)[:num_missing]
    return sorted(global_stage + local_stage), set(global_stage)


def prune_batch(
    maps: NDArray[np.floating], grid: tuple[int, int], spec: PruningSpec
) -> tuple[list[list[int]], list[int]]:
    """Give the padded indices and the counts of every tile, as every form of the op must."""
    kept = [prune_tile(tile, grid, spec)[0] for tile in maps.tolist()]
    capacity = spec.capacity(grid)
    return [tile + [-1] * (capacity - len(tile)) for tile in kept], [len(tile) for tile in kept]


def hard_maps(grid: tuple[int, int], spec: PruningSpec, seed: int = 0) -> NDArray[np.float32]:
    """Give maps [tiles, patches] on which ties, -inf and full windows decide."""
    rows, cols = grid
    rng = np.random.default_rng(seed)
    num_patches = rows * cols
    region_rows, region_cols = -(-rows // spec.regions), -(-cols // spec.regions)

    def blank(value: float) -> NDArray[np.float32]:
        return np.full(grid, value, dtype=np.float32)

    ramp = np.arange(num_patches, dtype=np.float32).reshape(grid)
    one_window = blank(0)
    one_window[: spec.window, : spec.window] = 9
    # The scores of whole windows differ, so that the global stage fills windows to the last patch.
    blocks = np.kron(rng.random((rows, cols)), np.ones((spec.window, spec.window)))[:rows, :cols]
    one_alive = blank(-INF)
    one_alive[-1, -1] = 0
    first_region_dead = ramp.copy()
    first_region_dead[:region_rows, :region_cols] = -INF
    one_region_alive = blank(-INF)
    one_region_alive[:region_rows, :region_cols] = 0.5
    mostly_dead = np.where(rng.random(grid) < 0.9, -INF, rng.random(grid))
    infinite = np.where(rng.random(grid) < 0.3, INF, rng.integers(-2, 2, grid))
    maps = [
        blank(0),
        blank(0.25),
        blank(-INF),
        blank(INF),
        ramp,
        -ramp,
        one_window,
        blocks,
        one_alive,
        first_region_dead,
        one_region_alive,
        mostly_dead,
        infinite,
        np.where(rng.random(grid) < 0.5, 0.0, -0.0),
        rng.integers(0, 2, grid),
        rng.integers(0, 4, grid),
        rng.random(grid),
        rng.normal(size=grid) * 1e-30,
    ]
    return np.stack(maps).astype(np.float32).reshape(len(maps), num_patches)


# Pairs that a form of the op is built for, where building it is costly.
CASES: list[tuple[tuple[int, int], PruningSpec]] = [
    *((PAPER_GRID, spec) for spec in PRESETS.values()),
    ((5, 7), PruningSpec()),
    ((5, 7), PruningSpec(regions=3, window=2, global_ratio=0.5)),
    ((5, 7), PruningSpec(regions=2, window=3, global_ratio=0.3, keep=11)),
    ((5, 7), PruningSpec(regions=3, window=4, global_ratio=0.7, keep=34)),
    ((5, 7), PruningSpec(regions=5, window=5, global_ratio=0.9)),
    ((6, 4), PruningSpec(regions=2, window=2, global_ratio=0.0)),
    ((6, 4), PruningSpec(regions=2, window=2, global_ratio=1.0)),
    ((6, 4), PruningSpec(regions=2, window=4, global_ratio=1.0, keep=5)),
    ((1, 9), PruningSpec(regions=1, window=1, global_ratio=0.25, keep=4)),
    ((9, 1), PruningSpec(regions=1, window=1, global_ratio=0.5)),
    ((1, 1), PruningSpec(regions=1, window=1, global_ratio=1.0, keep=1)),
    ((20, 20), PruningSpec(global_ratio=0.7, window=3)),
    # SigLIP at 384 px, with its preset 192.
    ((27, 27), PruningSpec(window=3, global_ratio=32 / 144, keep=243)),
]


@st.composite
def grids_and_specs(draw: st.DrawFn) -> tuple[tuple[int, int], PruningSpec]:
    """Draw a small grid and a spec that fits it."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    side = st.integers(1, min(grid))
    spec = PruningSpec(
        regions=draw(side),
        window=draw(side),
        global_ratio=draw(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0]) | st.floats(0, 1)),
        keep=draw(st.none() | st.integers(1, math.prod(grid))),
    )
    spec.validate(grid)
    return grid, spec


def score_maps(num_patches: int, max_tiles: int = 3) -> st.SearchStrategy[NDArray[np.float32]]:
    """Draw maps [tiles, patches] float32 with many ties, -inf and +inf, or any floats but NaN."""
    few_values = st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, INF])
    any_values = st.floats(width=32, allow_nan=False)
    shape = st.tuples(st.integers(1, max_tiles), st.just(num_patches))
    return hnp.arrays(np.float32, shape, elements=few_values) | hnp.arrays(np.float32, shape, elements=any_values)
