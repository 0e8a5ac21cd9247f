"""What is to be reached on a GPU, and what was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.timing.stages import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.record import Row


@dataclass(frozen=True)
class Goal:
    """One goal on an H200, and the best of our systems beside it.

    Attributes:
        text: what is measured, and by what.
        bound: what is to be reached.
        found: what was; None where none of our systems ran.
        system: the best one; empty where none ran.
        over_floor: its time by its floor; None where that is not known.
        sense: whether the bound is the most or the least.
    """

    text: str
    bound: float
    found: float | None
    system: str = ""
    over_floor: float | None = None
    sense: Literal["at most", "at least"] = "at most"

    @classmethod
    def of_ratio(cls, text: str, bound: float, rows: Sequence[Row]) -> Goal:
        """The row with the least ratio to its baseline."""
        best = min(rows, key=lambda row: row.ratio, default=None)
        return cls(text, bound, None) if best is None else cls(text, bound, best.ratio, best.label, best.over_floor)

    @classmethod
    def of_floor(cls, text: str, bound: float, rows: Sequence[Row]) -> Goal:
        """The row that is nearest to its floor."""
        found = [(row.over_floor, row.label) for row in rows if row.over_floor is not None]
        ratio, label = min(found, default=(None, ""))
        return cls(text, bound, ratio, label, ratio)

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.found is None:
            return "not measured"
        is_met = self.found <= self.bound if self.sense == "at most" else self.found >= self.bound
        return "met" if is_met else "missed"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self) | {"verdict": self.verdict}


def goal_table(goals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and rows as text, from what `Goal.to_dict` gives."""
    rows = [["what", "goal", "found", "", "time / floor", "system"]]
    for goal in goals:
        found, over_floor = ("–" if goal[key] is None else number(goal[key]) for key in ("found", "over_floor"))
        rows.append(
            [goal["text"], f"{goal['sense']} {goal['bound']:g}", found, goal["verdict"], over_floor, goal["system"]]
        )
    return rows
