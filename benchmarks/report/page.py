"""The page of all results, with its plots: `python -m benchmarks.report` writes docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.ablation import ablation_tables
from benchmarks.accuracy.comparison import UNPRUNED, accuracy_table
from benchmarks.accuracy.intervals import goal_table
from benchmarks.accuracy.parity import table as parity_table
from benchmarks.report.excerpts import write_excerpts
from benchmarks.report.place import place_of
from benchmarks.report.plots import TITLES, draw
from benchmarks.report.serving import serving_parts
from benchmarks.report.time_plots import draw_budgets, draw_stages, draw_throughput
from benchmarks.timing.record import tables_of
from benchmarks.timing.stages import staged
from benchmarks.timing.table import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
# Pages that hold some of the tables.
EXCERPTED = (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "exactness.md")
HEAD = """\
# Benchmarks

Written by `make report` from the raw samples in [benchmarks/results](../benchmarks/results); `make bench` measures
again. All systems of a table ran in one session, in turns, round after round; a ratio is the median over the rounds of
a time divided by the baseline's time in the same round. Rounds in which other processes took more than 0.1 core were
dropped where enough others were left. Weights are random at real shapes, except for the accuracy of the miniature. Peak
memory is that of a system's own process, weights mapped from files included.
"""
NO_GPU = "Nothing here ran on a GPU; `python -m benchmarks.gpu` measures there.\n"
FLOOR_TEXT = """\
A floor is the time that a stage takes at best: its matrix products at the rate of a large product of the same kind
(float32, or uint8 by int8), or the reading of its weights and KV cache at the rate of a large copy, whichever takes
longer. Both rates are measured in the same run ([floor.py](../benchmarks/timing/floor.py)). The floor of a first token
is the sum of those of vision and prefill. "Ratio at floor" is the ratio of a system that takes exactly its floor: a
goal below it is out of reach. A floor has the noise of its run, so a system may be found a few percent below it. A dash
says that the run found no floor.
"""
ACCURACY_TEXT = """\
The trained [miniature](../benchmarks/miniature/README.md), 144 patches, whose language model saw dropped tokens in
training. Each rival is written from its paper ([rivals.py](../benchmarks/accuracy/rivals.py));
[accuracy.md](accuracy.md) says what the numbers mean. `python -m benchmarks.accuracy --ablation`"""
PARITY_TEXT = """\
The same miniature, at half of its tokens: bundles against PyTorch. Where a bundle keeps other patches, the widest swap
is the largest difference between the scores of patches that only one of the two keeps, over the mean score. `python -m
benchmarks.accuracy.parity`"""


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
        return _load(folder / f"{self.name}.json")


SECTIONS = (
    Section(
        "vision-cpu",
        "The vision stage on a CPU",
        "CLIP ViT-L/14 at 336 px. `python -m benchmarks.speed.latency`",
    ),
    Section(
        "vision-5-tiles-cpu",
        "The vision stage of five tiles on a CPU",
        "The same, for an image of LLaVA-NeXT. `python -m benchmarks.speed.latency --tiles 5`",
    ),
    Section(
        "ttft-cpu",
        "A whole answer on a CPU",
        "CLIP ViT-L/14 at 336 px with a Llama of 0.3 B; bundles by the precision of vision / language. Their vision "
        "stage is divided as ONNX Runtime's profiler found it. `python -m benchmarks.speed.ttft`",
    ),
    Section(
        "peers-float-cpu",
        "Beside OpenVINO GenAI on a CPU: float models",
        "The same models; OpenVINO GenAI does not prune LLaVA, and each ratio is to it. In OpenVINO our scores are "
        "computed in float32 so that the kept patches are those of float32; beside it, all in bfloat16. "
        "[openvino.md](openvino.md); `python -m benchmarks.peers --kind float` ([how](../benchmarks/peers/README.md))",
    ),
    Section(
        "peers-rounded-cpu",
        "Beside OpenVINO GenAI on a CPU: 8 and 4 bits",
        "Bundles by their [target](targets.md), in ONNX Runtime, beside OpenVINO GenAI in int4 with its vision tower "
        "quantised by NNCF. `python -m benchmarks.peers --kind rounded`",
    ),
    Section(
        "vision-cpu-avx2",
        "The vision stage on a CPU without AVX-512",
        "The same on a processor that has AVX2 alone. There PyTorch is nearer to "
        "ONNX Runtime in float32, and products of 8 bits, which take VNNI to be fast, gain less. "
        "`python -m benchmarks.speed.latency --tiles 1`",
    ),
    Section(
        "ttft-cpu-avx2",
        "A whole answer on a CPU without AVX-512",
        "The same models on that processor. `python -m benchmarks.speed.ttft`",
    ),
    Section(
        "exact-int8-cpu-avx2",
        "Exact products of 8 bits on that CPU",
        "What ONNX Runtime's exact kernels cost there against those that it takes by itself, which cut sums off: see "
        "[engines.md](engines.md#8-bits-without-vnni). `python -m benchmarks.speed.exact_int8`",
    ),
    Section(
        "prefill-cpu",
        "A prefill decoder",
        "The same models, int8 vision at preset 192; by the precision of the decoder, against one int4 decoder for "
        "all. `python -m benchmarks.speed.prefill`",
    ),
    Section(
        "prefill-7b-cpu",
        "LLaVA-1.5-7B shapes: a prefill decoder",
        "At real size. `python -m benchmarks.speed.prefill --checkpoint FOLDER --only 'int4, prefill in w8a8'` "
        "on what `python -m benchmarks.timing.large_checkpoint FOLDER` wrote",
    ),
    Section(
        "throughput-cpu",
        "Throughput on a CPU",
        "The same models; every answer about an image of its own. The paper's code answers one request at a time. "
        "`python -m benchmarks.speed.throughput`",
    ),
    Section(
        "prefetch-cpu",
        "Prefetching the next request's image",
        "The miniature, six requests in a row, each with an image of its own: `generate_each`, which prepares the "
        "next image while the present answer is decoded, against `generate`. On a CPU both share the cores. "
        "`python -m benchmarks.speed.prefetch --checkpoint benchmarks/miniature/checkpoint`",
    ),
    Section(
        "budgets-7b-cpu",
        "LLaVA-1.5-7B shapes: token budgets on a CPU",
        "int8 vision, int4 language; every budget against the same bundle unpruned. "
        "`python -m benchmarks.speed.budgets --checkpoint FOLDER` on what "
        "`python -m benchmarks.timing.large_checkpoint FOLDER` wrote",
    ),
    Section(
        "budgets-next-7b-cpu",
        "LLaVA-NeXT-7B shapes at 5 tiles: token budgets on a CPU",
        "int8 vision, int4 language; every budget against the same bundle unpruned. "
        "`python -m benchmarks.speed.budgets --checkpoint FOLDER` on what "
        "`python -m benchmarks.timing.large_checkpoint FOLDER --family llava_next` wrote",
    ),
    Section(
        "gpu",
        "On a GPU",
        "Everything in float16, at LLaVA-1.5-7B shapes; bundles by what runs their vision graph, and the selection "
        "kernel by its goal. `python -m benchmarks.gpu`",
    ),
)


def write_page(results: Path, page: Path) -> None:
    """Write the page and its plots from what was measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    found = {section: measured for section in SECTIONS if (measured := section.load(results)) is not None}
    parts = [HEAD]
    if any(row.get("over_floor") for measured in found.values() for row in measured["rows"]):
        parts.append(FLOOR_TEXT)
    if not any("gpu" in measured["environment"] for measured in found.values()):
        parts.append(NO_GPU)
    answers, budgets = {}, {}
    for section, measured in found.items():
        parts.append(f"## {section.title}\n\n{section.text}\n\n{text_of(measured)}\n")
        if section.name.startswith(("ttft", "prefill", "budgets")) and staged(measured["results"]):
            answers[section.title] = measured
        if section.name.startswith("budgets"):
            budgets[section.title] = measured
        if section.name.startswith("throughput"):
            by_size = [result["samples"] for result in measured["results"].values()]
            draw_throughput(by_size, section.title, page.parent / f"{section.name}.png")
            parts.append(f"![Answers per second over the batch size]({section.name}.png)\n")
    parts += serving_parts(_load(results / "serve-cpu.json"), _load(results / "serve-memory-cpu.json"))
    if answers:
        draw_stages(answers, page.parent / "where-the-time-goes.png")
        parts.append("## Where the time goes\n\n![Stages of an answer](where-the-time-goes.png)\n")
    if budgets:
        draw_budgets(budgets, page.parent / "ttft-over-tokens.png")
        parts.append("## First token over tokens\n\n![Time to first token by budget](ttft-over-tokens.png)\n")
    parts += _accuracy(_load(results / "accuracy.json"), page.parent) + _parity(_load(results / "parity.json"))
    page.write_text("\n".join(parts), encoding="utf-8")


def text_of(measured: Any) -> str:
    """Where one file of results was measured, the lengths of prompt and answers where it says both, and its tables."""
    parts = [place_of(measured["environment"])]
    by_system = [result["samples"] for result in measured["results"].values()]
    samples = [sample for systems in by_system for passes in systems.values() for sample in passes]
    known = [sample for sample in samples if {"num_text_tokens", "num_image_tokens"} <= sample.keys()]
    if known:
        lengths = sorted({int(sample["num_new_tokens"]) for sample in samples if "num_new_tokens" in sample})
        answers = " to ".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
        image, text = (f"{known[0][f'num_{part}_tokens']:.0f}" for part in ("image", "text"))
        prompts = f"{image} tokens of the image before pruning, and {text} of text"
        parts.append(f"Prompts: {prompts}. Answers: {answers} tokens.")
    return "\n\n".join([*parts, *map(markdown, tables_of(measured))])


def _accuracy(measured: Any, plots: Path) -> list[str]:
    if measured is None:
        return []
    [whole] = (result["accuracy"]["all"] for result in measured["results"] if result["rule"] == UNPRUNED)
    summary = f"{_asked(measured)}; percent right. Unpruned, {measured['num_patches']} tokens: {whole['value']:.1f}."
    table = markdown(accuracy_table(measured["results"]))
    parts = [f"## Accuracy over tokens\n\n{ACCURACY_TEXT}\n\n{summary}\n\n{table}\n"]
    for kind, title in TITLES.items():
        draw(measured, kind, plots / f"accuracy-{kind}.png")
        parts.append(f"![{title}](accuracy-{kind}.png)\n")
    parts.append(f"{markdown(goal_table(measured['goals']))}\n")
    if "ablation" in measured:
        settings = "\n\n".join(map(markdown, ablation_tables(measured["ablation"])))
        parts.append(f"### Each setting by itself\n\n{settings}\n")
    return parts


def _parity(measured: Any) -> list[str]:
    if measured is None:
        return []
    summary = f"{_asked(measured)}; {measured['num_kept']} tokens kept."
    table, goals = markdown(parity_table(measured["systems"])), markdown(goal_table(measured["goals"]))
    return [f"## Bundles and PyTorch\n\n{PARITY_TEXT}\n\n{summary}\n\n{table}\n\n{goals}\n"]


def _asked(measured: Any) -> str:
    return f"{measured['num_questions']:,} questions on {measured['num_pictures']:,} held-out pictures"


def _load(file: Path) -> Any:
    """What was measured; None where it was not."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw samples")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; its plots go beside it")
    options = parser.parse_args(arguments)
    write_page(options.results, options.page)
    print(options.page)
    # Results of elsewhere leave the repository's own pages alone.
    if options.results == RESULTS:
        for page in EXCERPTED:
            write_excerpts(options.results, page)
            print(page)
