"""The page of all results, with its plots: `python -m benchmarks.report` writes docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import UNPRUNED
from benchmarks.plots import TITLES, draw
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """\
# Benchmarks

Written by `make report` from the raw samples in [benchmarks/results](../benchmarks/results); `make bench` measures
anew. All systems of a table ran in one session, in turns, round after round; a ratio is the median over the rounds of
a time by the baseline's of the same round. Rounds in which other processes took more than 0.1 core were dropped where
there were enough others. Weights are random at real shapes, except for the accuracy of the miniature.
"""
ACCURACY_TEXT = """\
The trained [miniature](../benchmarks/miniature/README.md), 144 patches, whose language model saw dropped tokens in
training. Each rival is written from its paper ([rivals.py](../benchmarks/rivals.py)).
`python -m benchmarks.accuracy`"""
# The stages of an answer's first token, in their order.
STAGES = {"preprocess_ms": "preprocess", "vision_ms": "vision", "prefill_ms": "prefill"}
COLOURS = {"preprocess_ms": "#7f7f7f", "vision_ms": "#d62728", "prefill_ms": "#1f77b4"}


@dataclass(frozen=True)
class Section:
    """One file of results.

    Attributes:
        name: of the file, without its suffix.
        title: of the section.
        text: what was measured, and by which command.
    """

    name: str
    title: str
    text: str

    def load(self, folder: Path) -> Any:
        """What was measured; None where it was not."""
        file = folder / f"{self.name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


SECTIONS = (
    Section(
        "vision-cpu",
        "The vision stage on a CPU",
        "CLIP ViT-L/14 at 336 px, one picture. `python -m benchmarks.latency`",
    ),
    Section(
        "ttft-cpu",
        "A whole answer on a CPU",
        "CLIP ViT-L/14 at 336 px with a Llama of 0.3 B. `python -m benchmarks.ttft`",
    ),
    Section(
        "budgets-7b-cpu",
        "LLaVA-1.5-7B shapes: token budgets on a CPU",
        "int8 vision, int4 language; every budget against the same bundle unpruned. "
        "`python -m benchmarks.budgets --checkpoint FOLDER` on what "
        "`python -m benchmarks.large_checkpoint FOLDER` wrote",
    ),
    Section(
        "budgets-next-7b-cpu",
        "LLaVA-NeXT-7B shapes at 5 tiles: token budgets on a CPU",
        "int8 vision, int4 language; every budget against the same bundle unpruned. "
        "`python -m benchmarks.budgets --checkpoint FOLDER` on what "
        "`python -m benchmarks.large_checkpoint FOLDER --family llava_next` wrote",
    ),
)


def markdown(measured: Mapping[str, Any]) -> str:
    """The tables of one file of results, and where they were measured."""
    found = measured["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    lines = [f"{found['cpu']}, {found['num_threads']} threads, {found['date'][:10]}; {packages}."]
    for title in dict.fromkeys(row["table"] for row in measured["rows"]):
        lines += ["", f"| {title} | median ms | min | max | ratio | goal |", "|---|---|---|---|---|---|"]
        for row in measured["rows"]:
            if row["table"] == title:
                times = " | ".join(_number(value) for value in _spread(row["values_ms"]))
                goal = "" if row["goal"] is None else f"{row['goal']:g}, {row['verdict']}"
                lines.append(f"| {row['label']} | {times} | {row['ratio']:.4g} | {goal} |")
    stages = _stages(measured)
    if stages:
        lines += ["", "| where the time goes, median ms | tokens of the image | preprocess | vision | prefill |"]
        lines += ["|---|---|---|---|---|"]
        for name, values in stages.items():
            times = " | ".join(_number(values[stage]) for stage in STAGES)
            lines.append(f"| {name} | {values['num_kept_tokens']:.0f} | {times} |")
    memory = _peak_memory(measured)
    if memory:
        lines += ["", "| peak memory of the process | GiB |", "|---|---|"]
        lines += [f"| {name} | {peak_bytes / 2**30:.2f} |" for name, peak_bytes in memory.items()]
    return "\n".join(lines)


def _peak_memory(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of systems that had a process of their own."""
    systems = [item for results in measured["results"].values() for item in results["samples"].items()]
    key = "peak_memory_bytes"
    return {name: max(sample[key] for sample in samples) for name, samples in systems if key in samples[0]}


def _number(value: float) -> str:
    """Three digits at least, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _stages(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of the stages, for the systems that tell them apart."""
    found = {}
    for results in measured["results"].values():
        for name, samples in results["samples"].items():
            if all(stage in samples[0] for stage in STAGES):
                quantities = (*STAGES, "num_kept_tokens", "ttft_ms")
                found[name] = {key: median(sample[key] for sample in samples) for key in quantities}
    return found


def draw_stages(sections: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Draw where the time to first token goes, one panel per file of results.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, panels = _figure(len(sections), height=4.2)
    for axes, (title, measured) in zip(panels, sections.items(), strict=True):
        stages = _stages(measured)
        bottoms = [0.0] * len(stages)
        labels = [f"{name}\n{values['num_kept_tokens']:.0f} tokens" for name, values in stages.items()]
        for stage, label in STAGES.items():
            heights = [values[stage] / 1e3 for values in stages.values()]
            axes.bar(labels, heights, bottom=bottoms, label=label, color=COLOURS[stage], width=0.65)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        _finish(axes, title, "seconds to the first token")
        axes.tick_params(axis="x", labelsize=7)
    panels[0].legend(frameon=False)
    figure.savefig(output)


def draw_budgets(sections: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Draw the time to first token over the tokens of the image, with the range of the rounds."""
    figure, panels = _figure(len(sections), height=3.6)
    for axes, (title, measured) in zip(panels, sections.items(), strict=True):
        [results] = measured["results"].values()
        points = sorted(
            (median(sample["num_kept_tokens"] for sample in samples), *_spread([s["ttft_ms"] for s in samples]), name)
            for name, samples in results["samples"].items()
        )
        tokens = [point[0] for point in points]
        middle = [point[1] / 1e3 for point in points]
        spread = [[(p[1] - p[2]) / 1e3 for p in points], [(p[3] - p[1]) / 1e3 for p in points]]
        axes.errorbar(tokens, middle, yerr=spread, marker="o", capsize=3, color=COLOURS["prefill_ms"])
        for count, seconds, name in zip(tokens, middle, [point[4] for point in points], strict=True):
            axes.annotate(name, (count, seconds), textcoords="offset points", xytext=(6, -10), fontsize=8)
        axes.set_xlim(0, max(tokens) * 1.15)
        _finish(axes, title, "seconds to the first token")
        axes.set_xlabel("tokens of the image that the language model sees")
    figure.savefig(output)


def _figure(num_panels: int, height: float) -> tuple[Any, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    figure = Figure(figsize=(5.6 * num_panels, height), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def accuracy(measured: Mapping[str, Any]) -> str:
    """Accuracy of every rule by count, all questions, with half of its 95 % interval."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in measured["results"]:
        found.setdefault(result["rule"], {})[result["count"]] = result["accuracy"]["all"]
    [whole] = found.pop(UNPRUNED).values()
    counts = sorted({count for scores in found.values() for count in scores}, reverse=True)
    asked = f"{measured['num_questions']:,} questions on {measured['num_pictures']:,} held-out pictures; percent right."
    lines = [
        f"{asked} Unpruned, {measured['num_patches']} tokens: {whole['value']:.1f}.",
        "",
        f"| rule, tokens kept | {' | '.join(map(str, counts))} |",
        "|---|" + "---|" * len(counts),
    ]
    for rule, scores in found.items():
        cells = [
            f"{score['value']:.1f} ± {(score['high'] - score['low']) / 2:.1f}"
            for score in (scores[count] for count in counts)
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(results: Path, page: Path) -> None:
    """Write the page and its plots from what was measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    parts, staged, budgets = [HEAD], {}, {}
    for section in SECTIONS:
        measured = section.load(results)
        if measured is None:
            continue
        parts.append(f"## {section.title}\n\n{section.text}\n\n{markdown(measured)}\n")
        if _stages(measured):
            staged[section.title] = measured
        if section.name.startswith("budgets"):
            budgets[section.title] = measured
    file = results / "accuracy.json"
    if file.exists():
        measured = json.loads(file.read_text(encoding="utf-8"))
        parts.append(f"## Accuracy over tokens\n\n{ACCURACY_TEXT}\n\n{accuracy(measured)}\n")
        for kind, title in TITLES.items():
            name = f"accuracy-{kind}.png"
            draw(measured, kind, page.parent / name)
            parts.append(f"![{title}]({name})\n")
    if staged:
        draw_stages(staged, page.parent / "where-the-time-goes.png")
        parts.append("## Where the time goes\n\n![Preprocessing, vision and prefill](where-the-time-goes.png)\n")
    if budgets:
        draw_budgets(budgets, page.parent / "ttft-over-tokens.png")
        parts.append("## First token over tokens\n\n![Time to first token by budget](ttft-over-tokens.png)\n")
    page.write_text("\n".join(parts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw samples")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; its plots go beside it")
    options = parser.parse_args(arguments)
    write_page(options.results, options.page)
    print(options.page)


if __name__ == "__main__":
    main()
