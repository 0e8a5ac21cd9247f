from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hivtp.runtime.vision.agreement import Agreement, VisionTolerance, compare_outputs
from hivtp_ops.errors import BundleError, EngineError

WIDTH = 3
TOLERANCE = VisionTolerance(relative_error=0.1, importance_error=0.2, min_jaccard=0.9)
GOOD = Agreement(kept_jaccard=0.9, worst_jaccard=0.5, relative_error=0.1, median_row_error=0.1, importance_error=0.2)


def outputs(kept: list[list[int]], num_prefix_tokens: int = 0, capacity: int = 4) -> dict[str, np.ndarray]:
    """What a graph gives whose embedding of patch p of tile t is 10 t + p + 1 in every column; of the prefix, 100."""
    embeds = np.zeros((len(kept), num_prefix_tokens + capacity, WIDTH), np.float32)
    embeds[:, :num_prefix_tokens] = 100
    indices = np.full((len(kept), capacity), -1)
    for tile, patches in enumerate(kept):
        indices[tile, : len(patches)] = patches
        embeds[tile, num_prefix_tokens : num_prefix_tokens + len(patches)] = np.array(patches)[:, None] + 10 * tile + 1
    return {
        "image_embeds": embeds,
        "kept_indices": indices,
        "kept_counts": np.array([len(patches) for patches in kept]),
        "importance": np.full((len(kept), 6), 0.5, np.float32),
    }


def unpruned(num_tiles: int) -> dict[str, np.ndarray]:
    full = outputs([list(range(6))] * num_tiles, capacity=6)
    return {"image_embeds": full["image_embeds"]}


def test_the_same_outputs_agree():
    found = compare_outputs(outputs([[0, 2], [1, 5]]), outputs([[0, 2], [1, 5]]), 0)
    assert found == Agreement(1, 1, 0, 0, 0)


def test_embeddings_are_compared_patch_by_patch_wherever_they_stand():
    # Patch 3 is second in the one and third in the other.
    found = compare_outputs(outputs([[0, 3, 5]]), outputs([[1, 2, 3, 5]]), 0)
    assert found.relative_error == 0
    assert found.kept_jaccard == 2 / 5


def test_kept_sets_are_compared_tile_by_tile():
    found = compare_outputs(outputs([[0, 1, 2, 3], [0, 1]]), outputs([[0, 1, 2, 3], [1, 2]]), 0)
    assert found.kept_jaccard == pytest.approx((1 + 1 / 3) / 2)
    assert found.worst_jaccard == pytest.approx(1 / 3)


def test_errors_are_relative_and_the_median_row_stands_beside_the_norm():
    expected, altered = outputs([[0, 1, 2]]), outputs([[0, 1, 2]])
    # Rows of 1, 2 and 3: the last is off by 1, in each of its columns.
    altered["image_embeds"][0, 2] += 1
    found = compare_outputs(altered, expected, 0)
    assert found.relative_error == pytest.approx(1 / math.sqrt(1 + 4 + 9))
    assert found.median_row_error == 0
    altered["image_embeds"][0, 1] += 0.5
    assert compare_outputs(altered, expected, 0).median_row_error == pytest.approx(0.25)


def test_scores_are_compared_relative_to_the_mean_of_the_reference():
    expected, altered = outputs([[0]]), outputs([[0]])
    expected["importance"][0] = [1, 2, 3, 1, 2, 3]
    altered["importance"][0] = [1, 2, 3, 1, 2, 4]
    assert compare_outputs(altered, expected, 0).importance_error == 1 / 2


def test_padding_has_no_score_and_counts_where_one_side_alone_has_it():
    expected, altered = outputs([[0]]), outputs([[0]])
    expected["importance"][0, 3:] = altered["importance"][0, 3:] = -np.inf
    assert compare_outputs(altered, expected, 0).importance_error == 0
    altered["importance"][0, 2] = -np.inf
    assert compare_outputs(altered, expected, 0).importance_error == math.inf
    expected["importance"][:] = altered["importance"][:] = -np.inf
    assert compare_outputs(altered, expected, 0).importance_error == 0


def test_prefix_tokens_are_compared_and_are_no_patches():
    expected, altered = outputs([[0, 1]], 1), outputs([[1, 2]], 1)
    assert compare_outputs(altered, expected, 1).kept_jaccard == pytest.approx(1 / 3)
    assert compare_outputs(altered, expected, 1).relative_error == 0
    altered["image_embeds"][0, 0] += 50
    assert compare_outputs(altered, expected, 1).relative_error == pytest.approx(50 / math.sqrt(100**2 + 2**2))


def test_a_graph_that_prunes_nothing_keeps_every_patch():
    found = compare_outputs(unpruned(2), outputs([[0, 2, 4], [1, 3]]), 0)
    assert found.kept_jaccard == pytest.approx((3 / 6 + 2 / 6) / 2)
    assert found.relative_error == 0
    assert found.importance_error is None


def test_tiles_that_keep_nothing_agree():
    assert compare_outputs(outputs([[], [1]]), outputs([[], [1]]), 0).worst_jaccard == 1
    assert compare_outputs(outputs([[], [1]]), outputs([[0], [1]]), 0).worst_jaccard == 0


def narrow(found: dict[str, np.ndarray]) -> None:
    found["image_embeds"] = found["image_embeds"][:, :, 1:]


def lose_a_tile(found: dict[str, np.ndarray]) -> None:
    found.update({name: array[:1] for name, array in found.items()})


def flatten(found: dict[str, np.ndarray]) -> None:
    found["kept_indices"] = found["kept_indices"].ravel()


def lose_embeddings(found: dict[str, np.ndarray]) -> None:
    del found["image_embeds"]


def lose_scores(found: dict[str, np.ndarray]) -> None:
    found["importance"] = found["importance"][:, 1:]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (narrow, "embeddings of width 2 and 3 cannot be compared"),
        (lose_a_tile, "outputs of 1 and 2 tiles cannot be compared"),
        (flatten, r"image_embeds of shape \[2, 4, 3\] and kept_indices of shape \[8\] are not outputs of one vision"),
        (lose_embeddings, "gives no embeddings to compare"),
        (lose_scores, r"scores of shape \[2, 5\] and \[2, 6\] cannot be compared"),
    ],
)
def test_outputs_of_another_kind_are_refused(alter, message):
    found = outputs([[0], [1]])
    alter(found)
    with pytest.raises(EngineError, match=message):
        compare_outputs(found, outputs([[0], [1]]), 0)


def test_several_runs_count_by_their_worst_errors_and_their_mean_agreement():
    runs = [Agreement(1, 1, 0.1, 0.1, None), Agreement(0.5, 0.25, 0.3, 0.2, 0.7), Agreement(0.9, 0.75, 0.2, 0.6, 0.1)]
    assert Agreement.over(runs) == Agreement(pytest.approx(0.8), 0.25, 0.3, 0.2, 0.7)
    assert Agreement.over(runs[:1]).importance_error is None
    assert math.isnan(Agreement.over([*runs, replace(GOOD, relative_error=math.nan)]).relative_error)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({}, []),
        ({"importance_error": None}, []),
        ({"worst_jaccard": 0, "median_row_error": 9}, []),
        ({"kept_jaccard": 0.89}, ["kept patches agree to 0.89, allowed is at least 0.9"]),
        ({"relative_error": 0.11}, ["embeddings differ by 0.11, allowed is at most 0.1"]),
        ({"importance_error": 0.21}, ["scores differ by 0.21, allowed is at most 0.2"]),
        ({"relative_error": math.nan}, ["embeddings differ by nan, allowed is at most 0.1"]),
        ({"kept_jaccard": math.nan}, ["kept patches agree to nan, allowed is at least 0.9"]),
    ],
)
def test_a_tolerance_names_what_is_beyond_it(change, problems):
    assert TOLERANCE.problems(replace(GOOD, **change)) == problems


def test_the_wider_of_two_tolerances_holds_in_each_bound():
    assert TOLERANCE.loosened(VisionTolerance(0.2, 0.95, 0.1)) == VisionTolerance(0.2, 0.9, 0.2)
    assert TOLERANCE.loosened(VisionTolerance(0.2, 0.95)) == VisionTolerance(0.2, 0.9)


def test_scores_are_bounded_where_that_is_asked():
    assert replace(TOLERANCE, importance_error=None).problems(replace(GOOD, importance_error=9)) == []


def test_the_tolerance_of_an_export_is_read():
    verification = {"tolerance": {"relative_error": 0.1, "min_jaccard": 0.9, "importance_error": 1e-6}, "tiles": 2}
    assert VisionTolerance.read(verification) == VisionTolerance(0.1, 0.9, 1e-6)


@pytest.mark.parametrize(
    "verification",
    [
        {},
        [],
        {"tolerance": None},
        {"tolerance": {"relative_error": 0.1}},
        {"tolerance": {"relative_error": "0.1", "min_jaccard": 1}},
    ],
)
def test_a_damaged_tolerance_is_refused(verification):
    with pytest.raises(BundleError, match=r"does not say how exact its vision graph is \(.*\); export it again"):
        VisionTolerance.read(verification)
