from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.timing.harness import Results
from benchmarks.timing.record import Row, portable_settings, time_table


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine was slow in the second round, for both; the medians' ratio would be 1.
    row = Row("ours", [1.0, 20.0, 2.0], [2.0, 40.0, 2.0])
    assert row.ratio == 0.5
    assert row.verdict == ""


@pytest.mark.parametrize(("goal", "verdict"), [(0.5, "met"), (0.49, "missed")])
def test_a_goal_is_met_up_to_its_value(goal: float, verdict: str) -> None:
    row = Row("ours", [1.0], [2.0], goal)
    assert row.verdict == verdict
    assert time_table("title", [row.to_dict()])[1][-1] == f"{goal}, {verdict}"


def test_a_row_of_results_compares_with_another_system_and_holds_its_peak_memory() -> None:
    results = Results(
        {
            "ours": [{"ttft_ms": 1.0, "peak_memory_bytes": 5}, {"ttft_ms": 2.0, "peak_memory_bytes": 7}],
            "theirs": [{"ttft_ms": 2.0}, {"ttft_ms": 4.0}],
        },
        [0.0, 0.0],
    )
    assert Row.of(results, "ours", "ttft_ms", "theirs", 0.6) == Row("ours", [1.0, 2.0], [2.0, 4.0], 0.6, 7)
    assert Row.of(results, "theirs", "ttft_ms", "theirs").peak_memory_bytes is None


def test_a_row_says_how_far_it_is_from_its_floor() -> None:
    row = Row("ours", [1.0, 4.0, 3.0], [2.0, 4.0, 4.0], floor_ms=2.0)
    assert row.over_floor == 1.5
    assert Row("theirs", [1.0], [1.0]).over_floor is None
    results = Results({"ours": [{"ttft_ms": 6.0}]}, [0.0])
    assert Row.of(results, "ours", "ttft_ms", "ours", floor_ms=2.0).over_floor == 3.0


def test_a_table_has_floors_and_memory_where_they_are_known() -> None:
    ours = Row("ours", [1.0, 4.0, 3.0], [2.0, 4.0, 4.0], 0.5, 3 * 2**29, floor_ms=2.0).to_dict()
    theirs = Row("theirs", [1.0], [2.0]).to_dict()
    head, *lines = time_table("title", [ours, theirs])
    assert head[5:] == ["time / floor", "ratio at floor", "peak GiB", "goal"]
    assert lines[0] == ["ours", "3", "1", "4", "0.75", "1.5", "0.5", "1.50", "0.5, missed"]
    assert lines[1][5:] == ["–", "–", "–", ""]
    assert time_table("title", [theirs])[0][5:] == ["goal"]


@pytest.mark.parametrize(("floor_ms", "verdict"), [(None, "missed"), (1.0, "missed"), (1.3, "out of reach")])
def test_a_goal_below_the_ratio_at_the_floor_is_out_of_reach(floor_ms: float | None, verdict: str) -> None:
    row = Row("ours", [1.4, 1.6, 1.5], [4.0, 4.0, 4.0], goal=0.3, floor_ms=floor_ms)
    assert row.verdict == verdict
    assert row.ratio_at_floor == (None if floor_ms is None else floor_ms / 4)


def test_settings_hold_no_paths() -> None:
    assert portable_settings(Namespace(output=Path("/tmp/x.json"), rounds=3)) == {"rounds": "3"}
