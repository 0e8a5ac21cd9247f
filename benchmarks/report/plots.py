"""The plot of accuracy over the number of tokens; it needs matplotlib, which the extra `bench` brings."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.comparison import HIVTP, UNPRUNED
from benchmarks.report.figure import new_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Line:
    """How a rule is drawn."""

    colour: str
    marker: str
    style: str = "-"


# Those that bracket are grey; HIVTP is drawn last and thickest. Rules that are not here are in the tables alone.
LINES: Mapping[str, Line] = {
    "oracle": Line("0.55", "^", ":"),
    "adversary": Line("0.55", "v", ":"),
    "random": Line("#8c6d31", "x"),
    "uniform grid": Line("#bca136", "s"),
    "DivPrune": Line("#2ca02c", "D"),
    "VisionZip, dominant": Line("#e377c2", "h"),
    "column mean, last layer": Line("#17becf", "<"),
    "HiPrune": Line("#9467bd", "P", "-."),
    "global stage only": Line("#ff7f0e", ">", "--"),
    "local stage only": Line("#1f77b4", "*", "--"),
    HIVTP: Line("#d62728", "o"),
}
FOOTNOTE = "The miniature was trained with tokens dropped in half of its batches, which makes it forgive pruning."
TITLES = {"all": "All kinds", "number": "Reading the number"}


def draw(measured: Mapping[str, Any], kind: str, output: Path) -> None:
    """Draw the accuracy of every rule in LINES over the tokens that it keeps, with 95 % intervals.

    Args:
        measured: what benchmarks.accuracy.curves wrote.
        kind: of question, or "all".
        output: where to write; the suffix decides the format.
    """
    figure = new_figure(8.6, 5.2)
    axes = figure.add_subplot()
    by_rule: dict[str, list[Mapping[str, Any]]] = {}
    for result in measured["results"]:
        by_rule.setdefault(result["rule"], []).append(result)
    num_patches = measured["num_patches"]
    unpruned = by_rule[UNPRUNED]
    axes.axhline(unpruned[0]["accuracy"][kind]["value"], color="black", linewidth=1, label=UNPRUNED)
    places = sorted({result["count"] for result in measured["results"]}, reverse=True)
    for rank, (rule, line) in enumerate(LINES.items()):
        # With all patches, every rule gives the same.
        results = unpruned + by_rule[rule]
        scores = [result["accuracy"][kind] for result in results]
        values = [score["value"] for score in scores]
        is_hivtp = rule == HIVTP
        axes.errorbar(
            [result["num_kept"] for result in results],
            values,
            # Where all answers are right, the interval is a point, within rounding.
            yerr=[
                [max(0.0, value - score["low"]) for value, score in zip(values, scores, strict=True)],
                [max(0.0, score["high"] - value) for value, score in zip(values, scores, strict=True)],
            ],
            label=rule,
            color=line.colour,
            marker=line.marker,
            linestyle=line.style,
            linewidth=2.4 if is_hivtp else 1.2,
            markersize=6 if is_hivtp else 4.5,
            elinewidth=1,
            capsize=2,
            zorder=3 + rank,
        )
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{count}\n{100 * count / num_patches:.0f} %" for count in places])
    axes.minorticks_off()
    lowest = min(result["accuracy"][kind]["low"] for rule in LINES for result in by_rule[rule])
    axes.set_ylim(bottom=10 * (lowest // 10), top=101)
    axes.set_xlabel(f"visual tokens kept, of {num_patches}")
    figure.supxlabel(FOOTNOTE, fontsize=8)
    axes.set_ylabel("right answers in percent")
    axes.grid(alpha=0.25)
    num_pictures, num_questions = measured["num_pictures"], measured["num_questions"]
    num_asked = num_questions if kind == "all" else num_pictures
    axes.set_title(
        f"{TITLES[kind]}: {num_asked:,} questions on {num_pictures:,} held-out pictures, with 95 % intervals"
    )
    handles, labels = axes.get_legend_handles_labels()
    by_height = sorted(range(len(labels)), key=lambda index: -_mean(by_rule[labels[index]], kind))
    axes.legend(
        [handles[index] for index in by_height],
        [labels[index] for index in by_height],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        frameon=False,
        title="best to worst on average",
        title_fontsize=8,
    )
    figure.savefig(output)


def _mean(results: Sequence[Mapping[str, Any]], kind: str) -> float:
    return fmean(result["accuracy"][kind]["value"] for result in results)
