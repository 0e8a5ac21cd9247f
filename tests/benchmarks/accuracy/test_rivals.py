from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.accuracy import rivals
from benchmarks.accuracy.rivals import Encoded, HiPrune, Hivtp, all_rules, spec_for
from hivtp_ops import PRESETS, PruningSpec, select

if TYPE_CHECKING:
    from numpy.typing import NDArray

GRID = (12, 12)
NUM_PATCHES = math.prod(GRID)
NUM_LAYERS = 6
RULES = all_rules(first_layer=2, num_layers=2, object_layer=2)
EXACT = [name for name in RULES if name != "HIVTP, paper counts"]


def make_encoded(num_pictures: int = 5, seed: int = 0, **arrays: Any) -> Encoded:
    random = np.random.default_rng(seed)
    settings: dict[str, Any] = {
        "received": random.random((num_pictures, NUM_LAYERS, NUM_PATCHES)).astype(np.float32),
        "from_class": random.random((num_pictures, NUM_LAYERS, NUM_PATCHES)).astype(np.float32),
        "embeds": random.normal(size=(num_pictures, NUM_PATCHES, 8)).astype(np.float32),
        "foreground": random.random((num_pictures, NUM_PATCHES)) < 0.25,
        "seeds": np.arange(num_pictures) + 100,
        "grid": GRID,
    }
    return Encoded(**(settings | arrays))


def cells(kept: NDArray[np.int64]) -> set[tuple[int, int]]:
    return {divmod(int(index), GRID[1]) for index in kept}


@pytest.mark.parametrize("count", [1, 9, 16, 36, 72, 143, 144])
@pytest.mark.parametrize("name", EXACT)
def test_a_rule_keeps_as_many_as_asked_once_each_in_raster_order(name: str, count: int) -> None:
    kept = RULES[name](make_encoded(), count)
    assert kept.shape == (5, count)
    assert kept.dtype == np.int64
    assert kept.min() >= 0
    assert kept.max() < NUM_PATCHES
    assert (np.diff(kept, axis=1) > 0).all()


@pytest.mark.parametrize("name", RULES)
def test_a_picture_gets_in_a_batch_what_it_gets_alone(name: str) -> None:
    encoded = make_encoded()
    together = RULES[name](encoded, 36)
    alone = RULES[name](encoded[2:3], 36)
    assert alone.tolist() == together[2:3, : alone.shape[1]].tolist()
    assert (together[2, alone.shape[1] :] == -1).all()


@pytest.mark.parametrize("name", sorted(set(RULES) - {"oracle", "adversary"}))
def test_no_rule_but_the_two_that_bracket_looks_at_what_is_shown(name: str) -> None:
    encoded = make_encoded()
    blind = make_encoded(foreground=~encoded.foreground)
    assert RULES[name](encoded, 36).tolist() == RULES[name](blind, 36).tolist()


@pytest.mark.parametrize("preset", ["288", "192", "128", "64"])
def test_the_settings_for_a_count_are_those_of_the_presets(preset: str) -> None:
    spec = PRESETS[preset]
    assert spec.keep is not None
    assert spec_for(spec.keep, (24, 24)) == spec


def test_paper_counts_are_those_of_the_paper_at_half() -> None:
    # Scores with a peak, around which whole windows belong to the global stage.
    peak = -np.hypot(*(np.mgrid[:12, :12] - 5.5)).astype(np.float32)
    encoded = make_encoded(received=np.broadcast_to(peak.reshape(-1), (5, NUM_LAYERS, NUM_PATCHES)))
    kept = RULES["HIVTP, paper counts"](encoded, 72)
    expected = select(encoded.received[:, 2:4].mean(axis=1), GRID, PruningSpec())
    assert kept.tolist() == expected.indices.tolist()
    assert ((kept >= 0).sum(axis=1) < 72).all()


def test_an_override_replaces_one_setting() -> None:
    spec = Hivtp(1, 2, overrides={"window": 4}).spec(36, GRID)
    assert (spec.window, spec.keep, spec.first_layer, spec.num_layers) == (4, 36, 1, 2)
    assert spec.global_ratio == spec_for(36, GRID).global_ratio


def test_hivtp_looks_at_its_layers_only() -> None:
    encoded = make_encoded()
    other = encoded.received.copy()
    other[:, [0, 1, 4, 5]] = 7
    assert Hivtp(2, 2)(encoded, 36).tolist() == Hivtp(2, 2)(make_encoded(received=other), 36).tolist()


def test_the_global_stage_gives_every_region_its_share() -> None:
    # All of the attention lies in the top left region.
    scores = np.zeros((1, NUM_LAYERS, *GRID), np.float32)
    scores[..., :6, :6] = 1
    kept = RULES["global stage only"](make_encoded(1, received=scores.reshape(1, NUM_LAYERS, -1)), 36)
    regions = [(row // 6, column // 6) for row, column in cells(kept[0])]
    assert [regions.count(region) for region in ((0, 0), (0, 1), (1, 0), (1, 1))] == [9, 9, 9, 9]


@pytest.mark.parametrize(("count", "window", "least"), [(36, 2, 1), (72, 2, 2), (24, 3, 1), (9, 4, 1)])
def test_the_local_stage_gives_every_window_its_share(count: int, window: int, least: int) -> None:
    encoded = make_encoded()
    for picture, kept in enumerate(RULES["local stage only"](encoded, count)):
        by_window: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for row, column in cells(kept):
            by_window.setdefault((row // window, column // window), set()).add((row, column))
        assert len(by_window) == (GRID[0] // window) ** 2
        assert min(map(len, by_window.values())) == least
        scores = encoded.received[picture, 2:4].mean(axis=0).reshape(GRID)
        for (row, column), inside in by_window.items():
            block = scores[row * window : (row + 1) * window, column * window : (column + 1) * window]
            assert min(scores[cell] for cell in inside) == np.sort(block, axis=None)[-len(inside)]


def test_column_mean_and_visionzip_take_the_last_layer_and_class_attention_two() -> None:
    encoded = make_encoded()

    def best(scores: NDArray[Any]) -> list[list[int]]:
        return [sorted(np.argsort(-picture)[:20].tolist()) for picture in scores]

    assert RULES["column mean, last layer"](encoded, 20).tolist() == best(encoded.received[:, 5])
    assert RULES["VisionZip, dominant"](encoded, 20).tolist() == best(encoded.from_class[:, 5])
    assert RULES["class attention"](encoded, 20).tolist() == best(encoded.from_class[:, 4:6].sum(axis=1))


def test_hiprune_keeps_anchors_their_neighbours_and_registers() -> None:
    received = np.zeros((1, NUM_LAYERS, *GRID), np.float32)
    received[0, 2, 0, 11], received[0, 2, 5, 5] = 2, 1
    # Registers, best first: two that are buffers already, and three in the last row.
    received[0, 5, 0, 10], received[0, 5, 5, 6] = 9, 8
    received[0, 5, 11, 3:6] = 7, 6, 5
    encoded = make_encoded(1, received=received.reshape(1, NUM_LAYERS, -1))
    corner = {(0, 11), (0, 10), (1, 11)}
    middle = {(5, 5), (4, 5), (6, 5), (5, 4), (5, 6)}
    assert cells(HiPrune(object_layer=2, alpha=1.0)(encoded, 10)[0]) == corner | middle | {(11, 3), (11, 4)}


def test_hiprune_has_the_anchors_of_the_paper() -> None:
    # 0.1 of 144 is for anchors with four neighbours each: three anchors of 14.4 / 5.
    encoded = make_encoded(1)
    anchors = np.argsort(-encoded.received[0, 2])[:3].tolist()
    kept = set(HiPrune(object_layer=2)(encoded, 143)[0].tolist())
    assert set(anchors) <= kept
    registers = set(np.argsort(-encoded.received[0, 5])[:60].tolist())
    assert len(registers - set(HiPrune(object_layer=2)(encoded, 72)[0].tolist())) <= 5


def test_divprune_is_the_greedy_solution_of_max_min_diversity() -> None:
    encoded = make_encoded(2)
    for picture, kept in enumerate(RULES["DivPrune"](encoded, 12)):
        unit = encoded.embeds[picture] / np.linalg.norm(encoded.embeds[picture], axis=1, keepdims=True)
        distance = 1 - unit @ unit.T
        chosen: list[int] = []
        for _ in range(12):
            others = [index for index in range(NUM_PATCHES) if index not in chosen]
            rivals_of = {index: chosen or [other for other in others if other != index] for index in others}
            chosen.append(max(others, key=lambda index: min(distance[index, rivals_of[index]])))
        assert kept.tolist() == sorted(chosen)


def test_divprune_never_keeps_two_of_a_kind_while_others_are_left() -> None:
    directions = np.eye(8, dtype=np.float32)[np.arange(NUM_PATCHES) % 8]
    encoded = make_encoded(1, embeds=directions[None] * 3)
    kept = RULES["DivPrune"](encoded, 8)[0]
    assert all(first % 8 != second % 8 for first, second in combinations(kept.tolist(), 2))


def test_the_grid_is_a_checkerboard_at_half_and_every_other_at_a_quarter() -> None:
    encoded = make_encoded(2)
    half, quarter = (RULES["uniform grid"](encoded, count) for count in (72, 36))
    assert all((row + column) % 2 == 0 for row, column in cells(half[0]))
    assert all(row % 2 == column % 2 == 0 for row, column in cells(quarter[1]))
    assert cells(RULES["uniform grid"](encoded, 9)[0]) == {(row, col) for row in (0, 4, 8) for col in (0, 4, 8)}


def test_lots_depend_on_the_seed_of_the_picture_alone() -> None:
    first = rivals.random_patches(make_encoded(seed=1), 36)
    assert first.tolist() == rivals.random_patches(make_encoded(seed=2), 36).tolist()
    assert len({tuple(kept) for kept in first.tolist()}) == 5


def test_oracle_and_adversary_bracket_what_is_shown() -> None:
    encoded = make_encoded()
    for count in (9, 36, 72, 120):
        for picture, shown in enumerate(encoded.foreground):
            best = shown[rivals.oracle(encoded, count)[picture]].sum()
            worst = shown[rivals.adversary(encoded, count)[picture]].sum()
            assert best == min(count, shown.sum())
            assert worst == max(0, count - (~shown).sum())
