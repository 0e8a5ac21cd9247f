"""What a script leaves: its tables on the terminal, and every sample with the environment as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing.environment import environment
from benchmarks.timing.rates import rate_tables
from benchmarks.timing.stages import stage_table, staged
from benchmarks.timing.table import aligned, number

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.harness import Results
    from benchmarks.timing.table import Table


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
    def ratio_at_floor(self) -> float | None:
        """The ratio that it would have at its floor; None where that is not known."""
        return None if self.floor_ms is None else self.floor_ms / median(self.baseline_ms)

    @property
    def verdict(self) -> str:
        """Whether the goal is met, or out of reach of what is computed on this machine; empty where there is none."""
        if self.goal is None:
            return ""
        if self.ratio <= self.goal:
            return "met"
        return "missed" if self.ratio_at_floor is None or self.ratio_at_floor <= self.goal else "out of reach"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        derived = ("ratio", "over_floor", "ratio_at_floor", "verdict")
        return {name: getattr(self, name) for name in derived} | asdict(self)


def time_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Medians, ranges, ratios, floors and memory where they are known, and goals, from `Row.to_dict`."""
    has_memory = any(row.get("peak_memory_bytes") for row in rows)
    has_floor = any(row.get("over_floor") for row in rows)
    columns = [*(["time / floor", "ratio at floor"] if has_floor else []), *(["peak GiB"] if has_memory else [])]
    found = [[title, "median ms", "min", "max", "ratio", *columns, "goal"]]
    for row in rows:
        values = row["values_ms"]
        times = [number(value) for value in (median(values), min(values), max(values))]
        memory, floors = row.get("peak_memory_bytes"), [row.get("over_floor"), row.get("ratio_at_floor")]
        cells = ["–" if ratio is None else number(ratio) for ratio in floors] if has_floor else []
        if has_memory:
            cells.append("–" if memory is None else f"{memory / 2**30:.2f}")
        goal = "" if row["goal"] is None else f"{row['goal']:g}, {row['verdict']}"
        found.append([row["label"], *times, f"{row['ratio']:.4g}", *cells, goal])
    return found


def tables_of(measured: Mapping[str, Any]) -> list[Table]:
    """All tables of what a script measured, from the JSON that it wrote."""
    titles = dict.fromkeys(row["table"] for row in measured["rows"])
    tables = [time_table(title, [row for row in measured["rows"] if row["table"] == title]) for title in titles]
    tables += [stage_table(title, found) for title, found in staged(measured["results"]).items()]
    return tables + rate_tables([result["samples"] for result in measured["results"].values()])


def portable_settings(options: argparse.Namespace) -> dict[str, str]:
    """The options without paths: where things lay on one machine says nothing on another."""
    return {key: str(value) for key, value in vars(options).items() if not isinstance(value, Path)}


def write(options: argparse.Namespace, found: Mapping[str, Any], device: Mapping[str, Any] | None = None) -> None:
    """Print where something was measured, and write it as JSON beside it.

    Args:
        options: of the command line; `output` is the file.
        found: what was measured, ready for JSON.
        device: what to say of the machine beside `environment`.
    """
    where = {**environment(options.threads), **(device or {})}
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"environment": where, "settings": portable_settings(options), **found}
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"all samples: {options.output}")


def report(
    options: argparse.Namespace,
    tables: Mapping[str, Sequence[Row]],
    results: Mapping[str, Results],
    device: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables and write everything that was measured; `device` as in `write`."""
    rows = [{"table": title, **row.to_dict()} for title, rows in tables.items() for row in rows]
    found = {"rows": rows, "results": {name: asdict(result) for name, result in results.items()}}
    write(options, found, device)
    most = max(max(result.other_cores) for result in results.values())
    print(f"cores that other processes took: at most {most:.2f} in a round")
    for table in tables_of(found):
        print(f"\n{aligned(table)}")
