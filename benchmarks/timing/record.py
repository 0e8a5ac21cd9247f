"""What a script leaves behind: its tables on the terminal, and every sample with the environment as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing.harness import environment
from benchmarks.timing.stages import number

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.harness import Results


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: what was timed.
        values_ms: its times, one per round.
        baseline_ms: what they are compared with, one per round.
        goal: the ratio to reach at most; None where there is none.
        peak_memory_bytes: of its process; None where it shared one with others.
        floor_ms: what it cannot be faster than; None where that is not known.
    """

    label: str
    values_ms: Sequence[float]
    baseline_ms: Sequence[float]
    goal: float | None = None
    peak_memory_bytes: float | None = None
    floor_ms: float | None = None

    @classmethod
    def of(
        cls,
        results: Results,
        system: str,
        quantity: str,
        baseline: str,
        goal: float | None = None,
        floor_ms: float | None = None,
    ) -> Row:
        """One quantity of a system by the same quantity of another."""
        memory = [sample["peak_memory_bytes"] for sample in results.samples[system] if "peak_memory_bytes" in sample]
        values, base = results.values(system, quantity), results.values(baseline, quantity)
        return cls(system, values, base, goal, max(memory, default=None), floor_ms)

    @property
    def ratio(self) -> float:
        """The median over the rounds of the time by the baseline's of the same round."""
        return median(value / base for value, base in zip(self.values_ms, self.baseline_ms, strict=True))

    @property
    def over_floor(self) -> float | None:
        """How many times its floor the median takes; None where that is not known."""
        return None if self.floor_ms is None else median(self.values_ms) / self.floor_ms

    @property
    def least_ratio(self) -> float | None:
        """The ratio that it would have at its floor; None where that is not known."""
        return None if self.floor_ms is None else self.floor_ms / median(self.baseline_ms)

    @property
    def verdict(self) -> str:
        """Whether the goal is met, or out of reach of what is computed on this machine; empty where there is none."""
        if self.goal is None:
            return ""
        if self.ratio <= self.goal:
            return "met"
        return "missed" if self.least_ratio is None or self.least_ratio <= self.goal else "out of reach"


def table(title: str, rows: Sequence[Row]) -> str:
    """Medians, ranges, ratios to the baseline and to the floor, that at the floor, and memory, beside the goals."""
    width = max(len(text) for text in (title, *(row.label for row in rows)))
    names = {"median ms": 10, "min": 9, "max": 9, "ratio": 8, "/ floor": 8, "at floor": 9, "peak GiB": 9, "goal": 7}
    head = " ".join(f"{name:>{size}}" for name, size in names.items())
    lines = [f"{title:<{width}}  {head}"]
    for row in rows:
        values = row.values_ms
        times = [number(value) for value in (median(values), min(values), max(values))]
        line = f"{row.label:<{width}}  {times[0]:>10} {times[1]:>9} {times[2]:>9} {row.ratio:8.4f}"
        memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}"
        floor = "" if row.over_floor is None else f"{row.over_floor:.2f}"
        goal = "" if row.goal is None else f"{row.goal:7.3f}  {row.verdict}"
        least = "" if row.least_ratio is None else f"{row.least_ratio:.3f}"
        lines.append(f"{line} {floor:>8} {least:>9} {memory:>9} {goal}".rstrip())
    return "\n".join(lines)


def portable_settings(options: argparse.Namespace) -> dict[str, str]:
    """The options without paths: where things lay on one machine says nothing on another."""
    return {key: str(value) for key, value in vars(options).items() if not isinstance(value, Path)}


def measured(
    options: argparse.Namespace, tables: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
) -> dict[str, Any]:
    """Everything that was measured, and where, ready for JSON."""
    return {
        "environment": environment(options.threads),
        "settings": portable_settings(options),
        "rows": [
            {
                "table": title,
                "ratio": row.ratio,
                "over_floor": row.over_floor,
                "least_ratio": row.least_ratio,
                "verdict": row.verdict,
                **asdict(row),
            }
            for title, rows in tables.items()
            for row in rows
        ],
        "results": {name: asdict(result) for name, result in results.items()},
    }


def report(options: argparse.Namespace, tables: Mapping[str, Sequence[Row]], results: Mapping[str, Results]) -> None:
    """Print the tables and write everything that was measured."""
    written = measured(options, tables, results)
    print("\n".join(f"{key}: {value}" for key, value in written["environment"].items()))
    most = max(max(result.other_cores) for result in results.values())
    print(f"cores that other processes took: at most {most:.2f} in a round")
    for title, rows in tables.items():
        print(f"\n{table(title, rows)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"\nall samples: {options.output}")
