"""Scores with their intervals, and the goals that they are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from benchmarks.timing.table import Table

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A share or a difference of shares in percent, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


class Bootstrap:
    """Intervals over pictures drawn anew, since the questions of one picture are not independent.

    All scores of one Bootstrap are drawn from the same resamples.

    Args:
        num_pictures: pictures that every score is made of.
        seed: of the draws.
    """

    def __init__(self, num_pictures: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        even = np.full(num_pictures, 1 / num_pictures)
        self.weights = random.multinomial(num_pictures, even, size=NUM_RESAMPLES) / num_pictures

    def score(self, values: NDArray[Any]) -> Score:
        """The mean of what each picture gives.

        Args:
            values: [pictures] or [pictures, questions]; right or wrong, or the difference of two such.
        """
        by_picture = values.reshape(len(values), -1).mean(axis=1, dtype=np.float64) * 100
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(self.weights @ by_picture, [tail, 100 - tail])
        return Score(float(by_picture.mean()), float(low), float(high))


@dataclass(frozen=True)
class Goal:
    """What a score has to be.

    Attributes:
        text: what is measured.
        score: what came out.
        sense: whether the bound is a minimum or a maximum.
        bound: in percent, or in points.
    """

    text: str
    score: Score
    sense: Literal["at least", "at most"]
    bound: float

    @property
    def is_reached(self) -> bool:
        """Whether the value itself keeps to the bound; the interval says how sure that is."""
        return self.score.value >= self.bound if self.sense == "at least" else self.score.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self) | {"is_reached": self.is_reached}


def goal_table(goals: Sequence[Mapping[str, Any]]) -> Table:
    """What was to be reached, what was found, and whether that is enough, from `Goal.to_dict`."""
    rows = [["goal", "found", ""]]
    for goal in goals:
        asked = f"{goal['text']}: {goal['sense']} {goal['bound']:g}"
        rows.append([asked, str(Score(**goal["score"])), "reached" if goal["is_reached"] else "missed"])
    return rows


def with_margin(score: Mapping[str, float]) -> str:
    """A score, from its plain values, with half of its interval."""
    return f"{score['value']:.1f} ± {(score['high'] - score['low']) / 2:.1f}"
