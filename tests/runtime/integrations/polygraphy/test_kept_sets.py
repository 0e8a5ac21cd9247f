from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from polygraphy.comparator import Comparator, RunResults
from polygraphy.exception import PolygraphyException

from hivtp.runtime.integrations.polygraphy.kept_sets import KeptSets
from hivtp.runtime.vision.agreement import VisionTolerance

if TYPE_CHECKING:
    from pathlib import Path

STRICT = VisionTolerance(relative_error=0.01, importance_error=0.01, min_jaccard=0.9)


def results(*kept: list[int], factor: float = 1.0) -> list[dict[str, np.ndarray]]:
    """What a graph gives that keeps three patches of a tile, run by run; an embedding is as large as its patch."""
    return [
        {
            "image_embeds": np.array(patches, np.float32)[None, :, None] * np.ones(4, np.float32) * factor,
            "kept_indices": np.array([patches]),
            "kept_counts": np.array([len(patches)]),
            "importance": np.arange(8, dtype=np.float32)[None],
        }
        for patches in kept
    ]


def compared(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]], **settings: object) -> object:
    runs = RunResults()
    runs.add(first, runtime=1.0, runner_name="first")
    runs.add(second, runtime=1.0, runner_name="second")
    return Comparator.compare_accuracy(runs, compare_func=KeptSets(0, STRICT), **settings)


def test_the_same_sets_in_the_same_order_pass():
    assert compared(results([1, 2, 3], [4, 5, 6]), results([1, 2, 3], [4, 5, 6]))


def test_another_order_of_patches_passes_as_no_comparison_by_place_does():
    assert compared(results([1, 2, 3]), results([3, 1, 2]))
    runs = RunResults()
    runs.add(results([1, 2, 3]), runtime=1.0, runner_name="first")
    runs.add(results([3, 1, 2]), runtime=1.0, runner_name="second")
    assert not Comparator.compare_accuracy(runs)


def test_what_is_found_stands_under_the_embeddings():
    [found] = compared(results([1, 2, 3], factor=1.5), results([1, 2, 4]))
    [run] = found["first", "second"]
    assert run["image_embeds"].metric_values() == {
        "kept_jaccard": 0.5,
        "worst_jaccard": 0.5,
        "relative_error": pytest.approx(0.5),
        "median_row_error": pytest.approx(0.5),
        "importance_error": 0,
    }
    line, is_good = run["image_embeds"].describe()
    assert not is_good
    assert "FAILED: kept patches agree to 0.5, allowed is at least 0.9; embeddings differ by 0.5" in line


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (results([1, 2, 3], factor=1.02), results([1, 2, 3])),
        (results([1, 2, 3]), results([1, 2, 4])),
        (results([1, 2, 3], factor=np.nan), results([1, 2, 3])),
    ],
)
def test_a_fault_fails(first, second):
    assert not compared(first, second)


def test_averages_are_checked_where_that_is_asked():
    first, second = results(*[[1, 2, 3]] * 9, [1, 2, 3]), results(*[[1, 2, 3]] * 9, [1, 2, 4])
    assert not compared(first, second)
    assert compared(first, second, check_average=True)


def test_what_was_found_can_be_saved(tmp_path):
    file = tmp_path / "found.json"
    compared(results([1, 2, 3]), results([1, 2, 4])).save(str(file))
    [found] = json.loads(file.read_text())["lst"]
    [[_, [run]]] = found["lst"]
    assert run["image_embeds"]["kept_jaccard"] == 0.5
    assert run["image_embeds"]["thresholds"]["min_jaccard"] == 0.9


def test_the_bounds_are_those_of_the_bundle_unless_others_are_given(bare_bundle: Path):
    tolerance = KeptSets.of_bundle(str(bare_bundle)).thresholds_for("").tolerance
    assert tolerance.relative_error == 1e-4
    other = KeptSets.of_bundle(str(bare_bundle), min_jaccard=0.5).thresholds_for("").tolerance
    assert (other.min_jaccard, other.relative_error) == (0.5, 1e-4)


def test_outputs_of_another_kind_are_an_error_of_polygraphy():
    with pytest.raises(PolygraphyException, match="gives no embeddings to compare"):
        compared([{"logits": np.ones(3)}], results([1, 2, 3]))
