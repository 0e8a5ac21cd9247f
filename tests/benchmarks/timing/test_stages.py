from __future__ import annotations

import pytest

from benchmarks.timing.stages import stage_table, stages
from benchmarks.timing.table import aligned, markdown, number


def test_the_profile_of_a_bundle_divides_the_time_of_its_vision_stage() -> None:
    samples = {"bundle": [{"preprocess_ms": 1.0, "vision_ms": 100.0, "prefill_ms": 50.0}]}
    profiles = {"bundle": [{"vision_ms": 10.0, "tower_ms": 8.0, "selection_ms": 0.5, "projector_ms": 1.5}]}
    [times] = stages(samples, profiles).values()
    assert times == pytest.approx(
        {"preprocess_ms": 1, "tower_ms": 80, "selection_ms": 5, "projector_ms": 15, "prefill_ms": 50}
    )


def test_a_system_without_a_profile_has_one_time_for_its_vision_stage() -> None:
    samples = {"bundle": [{"vision_ms": 3.0, "num_kept_tokens": 64}, {"vision_ms": 5.0, "num_kept_tokens": 64}]}
    assert stages(samples, {}) == {"bundle": {"vision_ms": 4.0, "num_kept_tokens": 64}}


def test_a_system_that_times_its_tower_is_not_counted_twice() -> None:
    samples = {"Hugging Face": [{"vision_ms": 10.0, "tower_ms": 9.0, "projector_ms": 1.0}]}
    assert stages(samples, {}) == {"Hugging Face": {"tower_ms": 9.0, "projector_ms": 1.0}}


def test_decoding_is_what_follows_the_first_token() -> None:
    assert stages({"A": [{"ttft_ms": 30.0, "answer_ms": 45.0}]}, {}) == {"A": {"decode_ms": 15.0}}


def test_a_table_has_the_columns_that_some_system_has() -> None:
    found = {"A": {"num_kept_tokens": 576, "tower_ms": 9.0}, "B": {"num_kept_tokens": 64, "vision_ms": 1234.5}}
    rows = stage_table("answers", found)
    assert rows == [
        ["answers: where the time goes, median ms", "image tokens", "vision tower", "vision"],
        ["A", "576", "9", "–"],
        ["B", "64", "–", "1,234"],
    ]
    assert len({len(line) for line in aligned(rows).splitlines()}) == 1
    assert markdown(rows).splitlines()[1:3] == ["|---|---|---|---|", "| A | 576 | 9 | – |"]


@pytest.mark.parametrize(("value", "shown"), [(0.4264, "0.426"), (5.0, "5"), (99.96, "100"), (22480.1, "22,480")])
def test_numbers_have_no_exponent(value: float, shown: str) -> None:
    assert number(value) == shown
