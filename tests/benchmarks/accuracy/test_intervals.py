from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy.intervals import Bootstrap, Goal, Score, goal_table, with_margin


def test_a_score_is_the_mean_within_its_interval() -> None:
    values = np.random.default_rng(0).random((400, 7)) < 0.8
    score = Bootstrap(400).score(values)
    assert score.value == pytest.approx(100 * values.mean())
    # Of 2,800 independent answers, 95 % of the means lie within 1.96 standard errors.
    error = 196 * (0.8 * 0.2 / 2800) ** 0.5
    assert score.value - score.low == pytest.approx(error, rel=0.15)
    assert score.high - score.value == pytest.approx(error, rel=0.15)


def test_questions_of_one_picture_do_not_count_as_independent() -> None:
    by_picture = np.random.default_rng(0).random(200) < 0.5
    bootstrap = Bootstrap(200)
    assert bootstrap.score(np.repeat(by_picture[:, None], 7, axis=1)) == bootstrap.score(by_picture)


def test_what_never_varies_has_no_width() -> None:
    assert Bootstrap(10).score(np.ones((10, 7), dtype=bool)) == Score(100, 100, 100)


def test_a_difference_on_the_same_pictures_is_surer_than_its_parts() -> None:
    random = np.random.default_rng(0)
    first = random.random((300, 7)) < 0.7
    second = first & (random.random((300, 7)) < 0.97)
    bootstrap = Bootstrap(300)
    gap, whole = bootstrap.score(first.astype(float) - second), bootstrap.score(first)
    assert gap.value > 0
    assert gap.high - gap.low < 0.6 * (whole.high - whole.low)


def test_draws_are_the_same_every_time() -> None:
    values = np.random.default_rng(0).random((50, 7)) < 0.5
    assert Bootstrap(50).score(values) == Bootstrap(50).score(values)


@pytest.mark.parametrize(
    ("value", "sense", "is_reached"),
    [(1.5, "at most", True), (1.6, "at most", False), (15.0, "at least", True), (14.9, "at least", False)],
)
def test_a_goal_is_reached_up_to_its_bound(value: float, sense: str, is_reached: bool) -> None:
    goal = Goal("points", Score(value, value - 1, value + 1), sense, 1.5 if sense == "at most" else 15.0)  # type: ignore[arg-type]
    assert goal.is_reached is is_reached
    found = f"{value:.1f} [{value - 1:.1f}, {value + 1:.1f}]"
    row = [f"points: {sense} {goal.bound:g}", found, "reached" if is_reached else "missed"]
    assert goal_table([goal.to_dict()]) == [["goal", "found", ""], row]


def test_a_margin_is_half_of_the_interval() -> None:
    assert with_margin({"value": 97.44, "low": 96.0, "high": 99.0}) == "97.4 ± 1.5"
