from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from hivtp.runtime.inputs.tile_layout import TileLayout
from hivtp.runtime.vision.packing import NewlineRule, pack_tiles, tile_budgets, trim_tile
from hivtp.runtime.vision.stage import EncodedTile, KeptPatches
from hivtp_ops import PRESETS, PruningSpec, select
from hivtp_ops.errors import EngineError, ScoreError, SpecError
from tests.hivtp_ops.brute_force import grids_and_specs, score_maps

if TYPE_CHECKING:
    from collections.abc import Sequence

INF = float("inf")
NEWLINE = -1
RULES = get_args(NewlineRule)
# Tall and thin to the point where unpadding leaves no column, and the same for rows.
NO_COLUMNS = TileLayout(3, 1, (9000, 10))
NO_ROWS = TileLayout(1, 3, (10, 9000))

sizes = st.tuples(st.integers(2, 2000), st.integers(2, 2000)) | st.tuples(st.integers(2, 9), st.integers(2, 9000))
layouts = st.builds(TileLayout, st.integers(1, 4), st.integers(1, 4), sizes)


def encode(kept: Sequence[Sequence[int]], num_patches: int) -> list[EncodedTile]:
    """Tiles whose tokens say where they come from: [tile * num_patches + patch, its negative minus 10]."""
    tiles = []
    for tile, indices in enumerate(kept):
        ids = tile * num_patches + np.array(indices, np.float32)
        tiles.append(EncodedTile(np.stack([ids, -ids - 10], axis=1), KeptPatches(np.array(indices, np.int64), None)))
    return tiles


def pack(layout: TileLayout, grid: tuple[int, int], kept: Sequence[Sequence[int]], rule: NewlineRule) -> list[int]:
    """Ids of a picture's tokens in order, NEWLINE for a newline."""
    newline = np.array([NEWLINE, -NEWLINE - 10], np.float32)
    packed = pack_tiles(layout, grid, encode(kept, math.prod(grid)), newline, rule)
    assert packed.dtype == np.float32
    assert (packed[:, 1] == -packed[:, 0] - 10).all()
    return packed[:, 0].astype(int).tolist()


def original(layout: TileLayout, side: int) -> list[int]:
    """What transformers makes of every token of the same picture."""
    image_size, pinpoint = side * 14, [layout.tile_rows * side * 14, layout.tile_cols * side * 14]
    vision = SimpleNamespace(image_size=image_size, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[pinpoint]))
    features = torch.arange(layout.num_tiles * side * side).view(layout.num_tiles, side * side, 1)
    packed, _ = LlavaNextModel.pack_image_features(
        model, [features], torch.tensor([layout.image_size]), "default", image_newline=torch.tensor([NEWLINE])
    )
    return packed[0][:, 0].tolist()


def everything(layout: TileLayout, grid: tuple[int, int]) -> list[list[int]]:
    return [np.flatnonzero(tile).tolist() for tile in layout.patch_mask(grid)]


@st.composite
def pruned_pictures(draw):
    layout, side = draw(layouts), draw(st.integers(1, 7))
    share = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = [[patch for patch in tile if rng.random() < share] for tile in everything(layout, (side, side))]
    return layout, side, kept


@settings(max_examples=150, deadline=None)
@given(layouts, st.integers(1, 8))
@example(TileLayout(2, 2, (672, 672)), 24)
@example(TileLayout(1, 3, (336, 900)), 24)
@example(TileLayout(3, 1, (1000, 300)), 24)
@example(NO_ROWS, 24)
@example(NO_COLUMNS, 24)
def test_with_everything_kept_the_tokens_are_those_of_the_original(layout, side):
    grid = (side, side)
    expected = original(layout, side)
    kept = everything(layout, grid)
    assert pack(layout, grid, kept, "all") == expected
    assert pack(layout, grid, kept, "none") == [token for token in expected if token != NEWLINE]
    columns = layout.patch_cols(grid)
    if columns.start < columns.stop:
        assert pack(layout, grid, kept, "kept-rows") == expected


def test_without_any_column_only_the_rule_all_has_the_newlines_of_the_original():
    grid = (24, 24)
    kept = everything(NO_COLUMNS, grid)
    assert [len(tile) for tile in kept] == [576, 0, 0, 0]
    assert pack(NO_COLUMNS, grid, kept, "all") == original(NO_COLUMNS, 24) == [*range(576), *[NEWLINE] * 72]
    assert pack(NO_COLUMNS, grid, kept, "kept-rows") == [*range(576)]


@settings(max_examples=200, deadline=None)
@given(pruned_pictures())
def test_kept_tokens_stand_in_the_order_of_the_original_with_the_newlines_of_the_rule(pruned_picture):
    layout, side, kept = pruned_picture
    alive = {tile * side * side + patch for tile, indices in enumerate(kept) for patch in indices}
    tokens = original(layout, side)
    expected: dict[str, list[int]] = {"all": [], "none": [], "kept-rows": []}
    is_row_kept = False
    for position, token in enumerate(tokens):
        if token == NEWLINE:
            expected["all"].append(NEWLINE)
            expected["kept-rows"] += [NEWLINE] * is_row_kept
            is_row_kept = False
        elif token in alive:
            for rule in RULES:
                expected[rule].append(token)
            # The base tile has no rows of its own.
            is_row_kept = position >= side * side
    for rule in RULES:
        assert pack(layout, (side, side), kept, rule) == expected[rule]


def test_rows_run_across_the_tiles():
    # Two tiles of 2 x 2, nothing to unpad: the row 0 1 | 4 5 of tiles 1 and 2 is one row of the picture.
    layout = TileLayout(1, 2, (28, 56))
    kept = [[3], [0, 2], [1, 3]]
    assert pack(layout, (2, 2), kept, "kept-rows") == [3, 4, 9, NEWLINE, 6, 11, NEWLINE]
    kept = [[], [2], []]
    assert pack(layout, (2, 2), kept, "kept-rows") == [6, NEWLINE]
    assert pack(layout, (2, 2), kept, "all") == [NEWLINE, 6, NEWLINE]
    assert pack(layout, (2, 2), kept, "none") == [6]


def test_tiles_need_not_be_square_grids():
    layout = TileLayout(2, 1, (56, 56))
    grid = (1, 4)
    assert everything(layout, grid) == [[0, 1, 2, 3], [1, 2], [1, 2]]
    assert pack(layout, grid, everything(layout, grid), "all") == [0, 1, 2, 3, 5, 6, NEWLINE, 9, 10, NEWLINE]


@pytest.mark.parametrize("rule", RULES)
def test_a_picture_of_which_nothing_is_kept_has_only_the_newlines_of_every_row(rule):
    packed = pack(TileLayout(1, 2, (28, 56)), (2, 2), [[], [], []], rule)
    assert packed == ([NEWLINE, NEWLINE] if rule == "all" else [])


def test_a_kept_patch_of_the_padding_is_noticed():
    layout = TileLayout(1, 1, (28, 14))
    assert everything(layout, (4, 4))[1][0] == 1
    with pytest.raises(AssertionError, match="padding"):
        pack(layout, (4, 4), [[0], [0]], "kept-rows")


def test_another_number_of_tiles_is_noticed():
    with pytest.raises(AssertionError, match="one encoded tile for each"):
        pack(TileLayout(1, 2, (28, 56)), (2, 2), [[0], [0]], "kept-rows")


@st.composite
def budget_problems(draw):
    shape = (draw(st.integers(2, 7)), draw(st.integers(1, 12)))
    scores = st.sampled_from([-INF, 0.0, 0.25, 1.0]) | st.floats(0, 1, width=32)
    importance = draw(hnp.arrays(np.float32, shape, elements=scores))
    importance[0] = importance[0].clip(min=0)
    least = draw(st.integers(0, shape[1]))
    total = draw(st.integers(least, max(least, 90)))
    capacity = draw(st.none() | st.integers(least, shape[1]))
    return importance, total, least, capacity


def bounds(importance: np.ndarray, least_for_base: int, capacity: int | None) -> tuple[np.ndarray, np.ndarray]:
    most = np.minimum((importance > -INF).sum(axis=1), importance.shape[1] if capacity is None else capacity)
    least = np.zeros_like(most)
    least[0] = min(least_for_base, most[0])
    return least, most


@settings(max_examples=300, deadline=None)
@given(budget_problems())
def test_budgets_spend_the_total_within_their_bounds(problem):
    importance, total, least_for_base, capacity = problem
    budgets = tile_budgets(*problem)
    least, most = bounds(importance, least_for_base, capacity)
    assert budgets.dtype == np.int64
    assert budgets.sum() == min(total, most.sum())
    assert (budgets >= least).all()
    assert (budgets <= most).all()


@settings(max_examples=300, deadline=None)
@given(budget_problems())
def test_budgets_are_within_one_token_of_one_rate_for_all_tiles(problem):
    importance, total, least_for_base, capacity = problem
    least, most = bounds(importance, least_for_base, capacity)
    masses = np.where(importance > -INF, importance, 0).sum(axis=1, dtype=np.float64)
    # Tiles without mass get tokens only when the others are full; that has its own test.
    assume(((masses > 1e-6) | (most == 0)).all())
    low, high = 0.0, 1e8
    for _ in range(70):
        rate = (low + high) / 2
        spent = np.clip(rate * masses, least, most).sum()
        low, high = (rate, high) if spent < total else (low, rate)
    assert np.abs(tile_budgets(*problem) - np.clip(high * masses, least, most)).max() < 1 + 1e-6


@settings(max_examples=100, deadline=None)
@given(budget_problems())
def test_a_larger_mass_never_gets_less(problem):
    importance, _, _, capacity = problem
    budgets = tile_budgets(importance, problem[1], 0, capacity)
    masses = [math.fsum(tile[tile > -INF]) for tile in importance]
    _, most = bounds(importance, 0, capacity)
    for tile, budget in enumerate(budgets):
        for other, other_budget in enumerate(budgets):
            if masses[tile] > masses[other]:
                assert budget >= min(other_budget, most[tile])


@settings(max_examples=100, deadline=None)
@given(budget_problems())
def test_only_the_proportions_of_the_scores_matter(problem):
    importance, *rest = problem
    assume((importance[importance > 0] > 1e-30).all())
    np.testing.assert_array_equal(tile_budgets(importance * np.float32(8), *rest), tile_budgets(importance, *rest))


def masses(*values: float, num_patches: int = 100) -> np.ndarray:
    """Scores that add up to the values, one tile each."""
    importance = np.zeros((len(values), num_patches), np.float32)
    importance[:, 0] = values
    return importance


@pytest.mark.parametrize(
    ("values", "total", "least", "expected"),
    [
        ((1, 1, 2), 40, 0, [10, 10, 20]),
        ((1, 1, 1), 10, 0, [4, 3, 3]),
        ((1, 1, 1), 11, 0, [4, 4, 3]),
        ((0.5, 1, 1), 4, 0, [1, 2, 1]),  # 0.8, 1.6, 1.6: the base tile's remainder is the largest, then a tie
        ((1, 1, 2), 40, 16, [16, 8, 16]),
        ((1, 1, 2), 16, 16, [16, 0, 0]),
        ((1, 1, 8), 150, 0, [25, 25, 100]),
        ((1, 0, 8), 150, 0, [50, 0, 100]),
        ((1, 0, 1), 260, 0, [100, 60, 100]),
        ((0, 0, 0), 30, 0, [10, 10, 10]),
        ((0, 1, 1), 30, 0, [0, 15, 15]),
        ((0, 1, 1), 30, 10, [10, 10, 10]),
        ((3, 1, 1), 1000, 10, [100, 100, 100]),
        ((1, 1), 0, 0, [0, 0]),
    ],
)
def test_budgets_follow_the_masses(values, total, least, expected):
    assert tile_budgets(masses(*values), total, least).tolist() == expected


def test_what_a_padded_tile_cannot_take_goes_to_the_others():
    importance = masses(1, 6, 1)
    importance[1, 10:] = -INF
    assert tile_budgets(importance, 40, 0).tolist() == [15, 10, 15]
    assert tile_budgets(importance, 500, 0).tolist() == [100, 10, 100]
    importance[1] = -INF
    assert tile_budgets(importance, 40, 0).tolist() == [20, 0, 20]


def test_tiles_without_mass_share_by_what_they_can_take():
    importance = masses(0, 0, 1)
    importance[1, 50:] = -INF
    assert tile_budgets(importance, 130, 0).tolist() == [20, 10, 100]
    assert tile_budgets(importance, 133, 0).tolist() == [22, 11, 100]


def test_no_tile_gets_more_than_the_capacity_of_the_graph():
    assert tile_budgets(masses(1, 2, 6), 90, 0, capacity=45).tolist() == [15, 30, 45]
    assert tile_budgets(masses(1, 2, 6), 120, 0, capacity=45).tolist() == [30, 45, 45]
    assert tile_budgets(masses(1, 2, 6), 1000, 0, capacity=45).tolist() == [45, 45, 45]


def test_the_base_tile_has_all_that_it_can_take_where_that_is_less_than_its_least():
    assert tile_budgets(masses(1, 1, num_patches=5), 8, 7).tolist() == [5, 3]


def test_a_total_below_the_least_of_the_base_tile_is_refused():
    with pytest.raises(SpecError, match="cannot keep 63 tokens in total: its base tile alone keeps 64 or more"):
        tile_budgets(masses(1, 1), 63, 64)


@pytest.mark.parametrize("score", [math.nan, INF, -0.5])
def test_scores_that_have_no_mass_are_an_error(score):
    with pytest.raises(ScoreError, match=r"NaN, \+inf or a negative score"):
        tile_budgets(masses(1, score), 10, 1)


@st.composite
def pruned_tiles(draw):
    grid, spec = draw(grids_and_specs())
    importance = draw(score_maps(math.prod(grid), max_tiles=1))
    return encode_selection(importance, grid, spec), grid, spec


def encode_selection(importance: np.ndarray, grid: tuple[int, int], spec: PruningSpec) -> EncodedTile:
    selection = select(importance, grid, spec)
    kept = selection.indices[0, : selection.counts[0]]
    return EncodedTile(np.stack([kept, kept + 1000], axis=1).astype(np.float32), KeptPatches(kept, importance[0]))


def assert_same(tile: EncodedTile, expected: EncodedTile) -> None:
    np.testing.assert_array_equal(tile.patches.kept_indices, expected.patches.kept_indices)
    np.testing.assert_array_equal(tile.embeds, expected.embeds)
    np.testing.assert_array_equal(tile.patches.importance, expected.patches.importance)


@settings(max_examples=150, deadline=None)
@given(pruned_tiles())
def test_each_count_keeps_a_subset_of_every_larger_one(pruned_tile):
    tile, grid, spec = pruned_tile
    larger = tile
    for keep in reversed(range(len(tile.patches.kept_indices) + 1)):
        smaller = trim_tile(tile, keep, grid, spec)
        assert len(smaller.embeds) == len(smaller.patches.kept_indices) == keep
        assert set(smaller.patches.kept_indices.tolist()) <= set(larger.patches.kept_indices.tolist())
        np.testing.assert_array_equal(smaller.embeds[:, 0], smaller.patches.kept_indices)
        assert_same(trim_tile(larger, keep, grid, spec), smaller)
        larger = smaller


@settings(max_examples=100, deadline=None)
@given(pruned_tiles(), st.data())
def test_a_trimmed_tile_is_the_tile_that_the_rule_gives_with_fewer(pruned_tile, data):
    tile, grid, spec = pruned_tile
    assume(len(tile.patches.kept_indices))
    keep = data.draw(st.integers(1, len(tile.patches.kept_indices)))
    fewer = PruningSpec(**(spec.to_dict() | {"keep": keep}))
    assert_same(trim_tile(tile, keep, grid, spec), encode_selection(tile.patches.importance[None], grid, fewer))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_trimmed_to_any_count(name):
    importance = np.random.default_rng(0).random((1, 576), dtype=np.float32)
    tile = encode_selection(importance, (24, 24), PRESETS[name])
    for keep in (0, 1, 17, len(tile.patches.kept_indices)):
        assert len(trim_tile(tile, keep, (24, 24), PRESETS[name]).embeds) == keep
    assert_same(trim_tile(tile, len(tile.patches.kept_indices), (24, 24), PRESETS[name]), tile)


def test_an_empty_tile_keeps_its_scores_and_its_width():
    tile = encode_selection(np.ones((1, 16), np.float32), (4, 4), PruningSpec())
    empty = trim_tile(tile, 0, (4, 4), PruningSpec())
    assert empty.embeds.shape == (0, 2)
    assert empty.patches.kept_indices.tolist() == []
    assert empty.patches.importance is tile.patches.importance


def test_trimming_never_adds():
    """The graph of a stranger may keep fewer than its manifest says, or others."""
    tile = encode_selection(np.ones((1, 16), np.float32), (4, 4), PruningSpec(keep=8))
    with pytest.raises(EngineError, match="kept 8 of the 9 patches that the bundle's rule keeps by its scores"):
        trim_tile(tile, 9, (4, 4), PruningSpec(keep=8))
    with pytest.raises(AssertionError):
        trim_tile(tile, -1, (4, 4), PruningSpec(keep=8))
