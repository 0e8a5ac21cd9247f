from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivtp_ops import PRESETS, PruningSpec, ScoreError, SpecError, select
from tests.hivtp_ops.brute_force import (
    CASES,
    INF,
    PAPER_GRID,
    grids_and_specs,
    hard_maps,
    higher_index_wins,
    prune_batch,
    prune_tile,
    score_maps,
)

case = pytest.mark.parametrize(("grid", "spec"), CASES, ids=str)


@st.composite
def problems(draw):
    grid, spec = draw(grids_and_specs())
    return draw(score_maps(math.prod(grid))), grid, spec


@case
def test_select_is_the_brute_force_on_hard_maps(grid, spec):
    maps = hard_maps(grid, spec)
    selection = select(maps, grid, spec)
    indices, counts = prune_batch(maps, grid, spec)
    assert selection.indices.tolist() == indices
    assert selection.counts.tolist() == counts


@settings(max_examples=300, deadline=None)
@given(problems())
def test_select_is_the_brute_force_on_any_map(problem):
    maps, grid, spec = problem
    selection = select(maps, grid, spec)
    indices, counts = prune_batch(maps, grid, spec)
    assert selection.indices.tolist() == indices
    assert selection.counts.tolist() == counts


@settings(max_examples=100, deadline=None)
@given(problems())
def test_stage_of_every_kept_patch_is_told(problem):
    maps, grid, spec = problem
    selection = select(maps, grid, spec)
    for tile, scores in enumerate(maps.tolist()):
        by_global = set(selection.indices[tile][selection.is_global[tile]].tolist())
        assert by_global == prune_tile(scores, grid, spec)[1]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_selection_keeps_its_promises(problem):
    maps, grid, spec = problem
    selection = select(maps, grid, spec)
    shape = (len(maps), spec.capacity(grid))
    assert selection.indices.shape == selection.is_global.shape == shape
    assert selection.indices.dtype == selection.counts.dtype == np.int64
    for scores, indices, count in zip(maps, selection.indices, selection.counts, strict=True):
        kept = indices[:count]
        assert (indices[count:] == -1).all()
        assert (np.diff(kept) > 0).all(), "raster order, each once"
        assert (scores[kept] > -INF).all()
        if spec.keep is not None:
            assert count == min(spec.keep, (scores > -INF).sum())


@settings(max_examples=50, deadline=None)
@given(problems())
def test_every_tile_of_a_batch_gives_what_it_gives_alone(problem):
    maps, grid, spec = problem
    together = select(maps, grid, spec)
    for tile in range(len(maps)):
        alone = select(maps[tile : tile + 1], grid, spec)
        assert np.array_equal(alone.indices[0], together.indices[tile])
        assert alone.counts[0] == together.counts[tile]
        assert np.array_equal(alone.is_global[0], together.is_global[tile])


@settings(max_examples=50, deadline=None)
@given(problems())
def test_only_the_order_of_the_scores_matters(problem):
    maps, grid, spec = problem
    # Positions among the sorted distinct scores keep order and ties; -inf stays what it is.
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape).astype(np.float32)
    ranks[maps == -INF] = -INF
    assert np.array_equal(select(ranks, grid, spec).indices, select(maps, grid, spec).indices)


def test_paper_preset_keeps_252_to_288():
    maps = np.concatenate([np.random.default_rng(seed).random((20, 576)) for seed in range(5)])
    maps = np.concatenate([maps, np.sort(maps[:5]), hard_maps(PAPER_GRID, PRESETS["paper"])[[0, 4, 5, 6, 7]]])
    counts = select(maps, PAPER_GRID, PRESETS["paper"]).counts
    assert counts.min() >= 252
    assert counts.max() <= 288


def test_paper_preset_reaches_252_and_288():
    # In each region, 9 windows of 4 hold the 36 best; then the best of each region, one per window.
    blocks = np.kron(np.random.default_rng(0).permutation(144).reshape(12, 12), np.ones((2, 2)))
    corners = np.zeros((24, 24))
    corners[::2, ::2] = 1
    maps = np.stack([blocks, corners]).reshape(2, 576).astype(np.float32)
    assert select(maps, PAPER_GRID, PRESETS["paper"]).counts.tolist() == [252, 288]


@pytest.mark.parametrize("name", ["288", "192", "128", "64"])
def test_exact_preset_keeps_its_number_whatever_the_scores(name):
    maps = hard_maps(PAPER_GRID, PRESETS[name])
    maps = maps[(maps > -INF).sum(axis=1) >= int(name)]
    assert (select(maps, PAPER_GRID, PRESETS[name]).counts == int(name)).all()


def test_exact_288_adds_the_best_of_the_rest_to_what_the_paper_keeps():
    maps = np.random.default_rng(1).random((8, 576), dtype=np.float32)
    paper = select(maps, PAPER_GRID, PRESETS["paper"])
    exact = select(maps, PAPER_GRID, PRESETS["288"])
    for tile in range(len(maps)):
        variable = set(paper.indices[tile, : paper.counts[tile]].tolist())
        fixed = set(exact.indices[tile].tolist())
        assert variable <= fixed
        unkept = sorted(set(range(576)) - variable, key=lambda index: -maps[tile, index])
        assert fixed - variable == set(unkept[: 288 - len(variable)])


def test_too_many_drops_the_local_stage_first_and_the_later_of_a_tie():
    # Windows of the second row of windows hold 1, the rest 0; the global stage keeps nothing.
    scores = np.zeros((4, 8), dtype=np.float32)
    scores[2:] = 1
    spec = PruningSpec(regions=1, global_ratio=0.0, window=2, keep=6)
    assert select(scores.reshape(1, -1), (4, 8), spec).indices.tolist() == [[0, 2, 16, 18, 20, 22]]
    # Two of the global stage have the lowest scores of all that is kept, and stay.
    spec = PruningSpec(regions=2, global_ratio=1 / 8, window=2, keep=5)
    selection = select(scores.reshape(1, -1), (4, 8), spec)
    assert selection.indices.tolist() == [[0, 4, 16, 17, 20]]
    assert selection.is_global.tolist() == [[True, True, True, False, True]]


def test_too_few_adds_the_lower_index_of_a_tie():
    spec = PruningSpec(regions=1, global_ratio=0.0, window=4, keep=3)
    assert select(np.zeros((1, 16), dtype=np.float32), (4, 4), spec).indices.tolist() == [[0, 1, 2]]


def test_wrong_tie_rule_is_seen():
    scores = np.zeros((1, 576), dtype=np.float32)
    for spec in PRESETS.values():
        kept = select(scores, PAPER_GRID, spec)
        wrong, _ = prune_tile(scores[0].tolist(), PAPER_GRID, spec, sort_key=higher_index_wins)
        assert kept.indices[0, : kept.counts[0]].tolist() != wrong


def test_wrong_window_is_seen():
    maps = np.random.default_rng(0).random((1, 576), dtype=np.float32)
    indices, _ = prune_batch(maps, PAPER_GRID, PruningSpec(window=3))
    assert select(maps, PAPER_GRID, PruningSpec()).indices.tolist() != indices


def test_layers_play_no_part():
    maps = np.random.default_rng(0).random((1, 35))
    assert np.array_equal(
        select(maps, (5, 7), PruningSpec(first_layer=1, num_layers=2)).indices,
        select(maps, (5, 7), PruningSpec()).indices,
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_dtypes_are_converted(dtype):
    maps = np.random.default_rng(0).random((3, 35)).astype(dtype)
    expected = select(maps.astype(np.float32), (5, 7), PruningSpec())
    assert np.array_equal(select(maps, (5, 7), PruningSpec()).indices, expected.indices)


def test_float64_scores_that_float32_cannot_tell_apart_are_ties():
    maps = np.array([[1.0, 1.0 + 1e-12, 0.0, 0.0]])
    spec = PruningSpec(regions=1, window=2, global_ratio=0.25, keep=1)
    assert select(maps, (2, 2), spec).indices.tolist() == [[0]]


def test_no_tiles_give_no_selection():
    selection = select(np.zeros((0, 35), dtype=np.float32), (5, 7), PruningSpec(keep=4))
    assert selection.indices.shape == (0, 4)
    assert selection.counts.shape == (0,)


def test_input_is_left_as_it_is():
    maps = np.random.default_rng(0).random((2, 35), dtype=np.float32)
    before = maps.copy()
    select(maps, (5, 7), PruningSpec(keep=9))
    assert np.array_equal(maps, before)


def test_nan_is_an_error_that_names_the_tile():
    maps = np.zeros((4, 35), dtype=np.float32)
    maps[2, 7] = np.nan
    with pytest.raises(ScoreError, match="tile 2 has NaN"):
        select(maps, (5, 7), PruningSpec())


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros(35, dtype=np.float32), r"\[tiles, 35\]"),
        (np.zeros((1, 5, 7), dtype=np.float32), r"\[tiles, 35\]"),
        (np.zeros((1, 36), dtype=np.float32), r"\(1, 36\)"),
        (np.zeros((1, 35), dtype=np.int64), "int64"),
        (np.zeros((1, 35), dtype=np.bool_), "bool"),
        (np.zeros((1, 35), dtype=np.complex64), "complex64"),
    ],
)
def test_scores_of_another_shape_or_kind_are_an_error(maps, message):
    with pytest.raises(ScoreError, match=message):
        select(maps, (5, 7), PruningSpec())


def test_spec_that_does_not_fit_is_an_error():
    with pytest.raises(SpecError, match="window is 8"):
        select(np.zeros((1, 35), dtype=np.float32), (5, 7), PruningSpec(window=8))
