"""First token by token budget, presets against the same bundle unpruned: `python -m benchmarks.speed.budgets`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.ttft import PROMPT, sample_of
from benchmarks.timing.harness import LocalSystem, Pass, Sample, Stopwatch, measure_in_turns, peak_memory_bytes
from benchmarks.timing.record import Row, report
from benchmarks.timing.shared_language import with_language_of
from benchmarks.timing.stages import stages, table, text
from benchmarks.timing.workspace import Workspace, add_length, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp import Pipeline

UNPRUNED = "unpruned"
PRESETS = ("288", "192", "128", "64")
# Of the unpruned bundle, at preset 192. The paper reports 0.50 and 0.449 with its own counts.
GOALS = {"llava": 0.45, "llava_next": 0.40}
# Square enough for LLaVA-NeXT's 2 x 2 tiles, which make 5 with the base tile.
PICTURE_SIZE = (800, 800)


def open_pipelines(bundles: Sequence[Path], num_threads: int) -> list[Pipeline]:
    """The bundles with one decoder in memory: theirs are the same, and a large one fits once."""
    from hivtp import Pipeline
    from hivtp.engines import EngineSettings

    first = Pipeline.load(bundles[0], num_threads=num_threads, image_cache_bytes=0)
    return [first, *(with_language_of(first, folder, EngineSettings(num_threads)) for folder in bundles[1:])]


def make_pass(pipeline: Pipeline, num_new_tokens: int) -> Pass:
    """One answer about a picture."""
    from PIL import Image

    blobs = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    image = Image.fromarray(blobs).resize(PICTURE_SIZE)

    def run() -> Sample:
        with Stopwatch() as total:
            answer = pipeline.generate(PROMPT, [image], max_new_tokens=num_new_tokens)
        return sample_of(answer, total.ms)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "budgets.json")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS, help="budgets (default: all)")
    add_length(parser, 4)
    parser.add_argument("--decoder-from", type=Path, help="a bundle of the checkpoint with an int4 decoder to take")
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "budgets")
    quantised = ExportSettings(vision_precision="int8", language_precision="int4", decoder_from=options.decoder_from)
    bundles = {UNPRUNED: workspace.bundle(UNPRUNED, replace(quantised, is_pruned=False))}
    for preset in options.presets:
        budget = replace(quantised, preset=preset, decoder_from=bundles[UNPRUNED])
        bundles[f"preset {preset}"] = workspace.bundle(f"preset {preset}", budget)
    with Stopwatch() as loading:
        pipelines = open_pipelines(list(bundles.values()), options.threads)
    systems = [
        LocalSystem(name, make_pass(pipeline, options.new_tokens))
        for name, pipeline in zip(bundles, pipelines, strict=True)
    ]
    results = measure_in_turns(systems, options.rounds)
    goals = {"preset 192": GOALS[pipelines[0].bundle.manifest.family]}
    tables = {
        title: [Row.of(results, name, quantity, UNPRUNED, limits.get(name)) for name in bundles]
        for title, quantity, limits in (
            ("time to first token", "ttft_ms", goals),
            ("decode per token", "decode_ms_per_token", {}),
        )
    }
    report(options, tables, {"answers": results})
    print(f"\n{text(table(stages(results.samples, {})))}")
    peak_gib = peak_memory_bytes() / 2**30
    print(f"\nloaded {len(bundles)} bundles in {loading.ms / 1e3:.1f} s; peak memory {peak_gib:.2f} GiB")


if __name__ == "__main__":
    main()
