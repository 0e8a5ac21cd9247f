"""Plots of time: where it goes, first token over tokens, and throughput over batch size; they need matplotlib."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.report.figure import new_figure
from benchmarks.timing.stages import STAGES, TOKENS, staged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

COLOURS = {
    "preprocess_ms": "#7f7f7f",
    "tower_ms": "#d62728",
    "selection_ms": "black",
    "projector_ms": "#ff9896",
    "vision_ms": "#e7595a",
    "prefill_ms": "#1f77b4",
    "decode_ms": "#aec7e8",
}
LINES = (("o", "#7f7f7f"), ("s", "#9467bd"), ("D", "#1f77b4"), ("^", "#d62728"), ("v", "#2ca02c"))


def draw_stages(sections: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Draw where the time of an answer goes, one panel per file of results.

    Args:
        sections: results by title, which tell stages apart.
        output: where to write.
    """
    panels = {
        f"{title}{name.removeprefix('answers')}, answers of {_length(measured, name)} tokens": times
        for title, measured in sections.items()
        for found in [staged(measured["results"])]
        for name, times in found.items()
    }
    figure = new_figure(9.4, sum(0.34 * len(times) + 0.95 for times in panels.values()) + 0.4)
    ratios = [0.34 * len(times) + 0.5 for times in panels.values()]
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    handles: dict[str, Any] = {}
    for axes, (title, by_system) in zip(all_axes, panels.items(), strict=True):
        labels = [_label(name, times) for name, times in by_system.items()]
        ends = [0.0] * len(labels)
        for stage in (stage for stage in STAGES if any(stage in times for times in by_system.values())):
            widths = [times.get(stage, 0.0) / 1e3 for times in by_system.values()]
            handles[stage] = axes.barh(labels, widths, left=ends, color=COLOURS[stage], height=0.7)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for place, end in enumerate(ends):
            axes.text(end, place, f" {end:.3g} s", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(ends) * 1.1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    all_axes[-1].set_xlabel("seconds")
    drawn = [stage for stage in STAGES if stage in handles]
    names = [STAGES[stage] if stage != "vision_ms" else "vision, not divided" for stage in drawn]
    figure.legend(
        [handles[stage] for stage in drawn], names, loc="outside upper center", ncols=7, frameon=False, fontsize=9
    )
    figure.savefig(output)


def _length(measured: Mapping[str, Any], name: str) -> str:
    """The tokens of an answer, or their range."""
    passes = measured["results"][name]["samples"].values()
    lengths = [int(sample["num_new_tokens"]) for samples in passes for sample in samples]
    return " to ".join(map(str, dict.fromkeys((min(lengths), max(lengths)))))


def _label(name: str, times: Mapping[str, float]) -> str:
    return f"{name} ({times[TOKENS]:,.0f} tokens)" if TOKENS in times else name


def draw_budgets(sections: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Draw the time to first token over the tokens of the image, with the range of the rounds.

    Args:
        sections: results of benchmarks.speed.budgets by title.
        output: where to write.
    """
    figure = new_figure(5.6 * len(sections), 3.8)
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, (title, measured) in zip(panels, sections.items(), strict=True):
        [results] = measured["results"].values()
        points = sorted(
            (median(sample[TOKENS] for sample in samples), [sample["ttft_ms"] / 1e3 for sample in samples], name)
            for name, samples in results["samples"].items()
        )
        tokens = [count for count, _, _ in points]
        _draw_ranges(axes, tokens, [seconds for _, seconds, _ in points], marker="o", color=COLOURS["prefill_ms"])
        for count, seconds, name in points:
            place = (count, median(seconds))
            axes.annotate(name, place, textcoords="offset points", xytext=(7, -11), fontsize=8)
        axes.set_xlim(0, max(tokens) * 1.2)
        axes.set_xlabel("tokens of the image that the language model sees")
        _finish(axes, title, "seconds to the first token")
    figure.savefig(output)


def draw_throughput(by_size: Sequence[Mapping[str, Sequence[Mapping[str, float]]]], title: str, output: Path) -> None:
    """Draw answers per second over the batch size, with the range of the rounds.

    Args:
        by_size: samples by system, for each batch size.
        title: of the plot.
        output: where to write.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    sizes = [next(iter(samples.values()))[0]["batch_size"] for samples in by_size]
    for index, system in enumerate(by_size[0]):
        marker, colour = LINES[index % len(LINES)]
        rates = [[sample["answers_per_s"] for sample in samples[system]] for samples in by_size]
        _draw_ranges(axes, sizes, rates, marker=marker, color=colour, label=system)
    axes.set_xticks(sizes)
    axes.set_xlabel("answers in a batch")
    _finish(axes, title, "answers per second")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(output)


def _draw_ranges(axes: Axes, places: Sequence[float], samples: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the medians, with the range of the samples at each place."""
    middle = [median(values) for values in samples]
    below = [value - min(values) for value, values in zip(middle, samples, strict=True)]
    above = [max(values) - value for value, values in zip(middle, samples, strict=True)]
    axes.errorbar(places, middle, yerr=[below, above], capsize=3, **style)


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
