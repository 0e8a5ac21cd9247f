"""First token by token budget, presets against the same bundle unpruned: `python -m benchmarks.speed.budgets`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pipelines import load_pipeline, with_language_of
from benchmarks.speed.ttft import make_pass
from benchmarks.timing.harness import Stopwatch, measure_in_turns
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import LocalSystem, peak_memory_bytes
from benchmarks.timing.workspace import Workspace, add_length, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

UNPRUNED = "unpruned"
PRESETS = ("288", "192", "128", "64")
# Of the unpruned bundle, at preset 192. The paper reports 0.50 and 0.449 with its own counts.
GOALS = {"llava": 0.45, "llava_next": 0.40}
# Square enough for LLaVA-NeXT's 2 x 2 tiles, which make 5 with the base tile.
IMAGE_SIZE = (800, 800)


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
    # One decoder in memory: theirs are the same, and a large one fits once.
    with Stopwatch() as loading:
        first = load_pipeline(bundles[UNPRUNED], options.threads, cache_bytes=0)
        pipelines = {UNPRUNED: first} | {
            name: with_language_of(first, bundle, options.threads)
            for name, bundle in bundles.items()
            if name != UNPRUNED
        }
    systems = [
        LocalSystem(name, make_pass(pipeline, options.new_tokens, IMAGE_SIZE)) for name, pipeline in pipelines.items()
    ]
    results = measure_in_turns(systems, options.rounds)
    goals = {"preset 192": GOALS[first.model.bundle.manifest.family]}
    tables = {
        title: [Row.of(results, name, quantity, UNPRUNED, limits.get(name)) for name in bundles]
        for title, quantity, limits in (
            ("time to first token", "ttft_ms", goals),
            ("decode per token", "decode_ms_per_token", {}),
        )
    }
    report(options, tables, {"answers": results})
    peak_gib = peak_memory_bytes() / 2**30
    print(f"\nloaded {len(bundles)} bundles in {loading.ms / 1e3:.1f} s; peak memory {peak_gib:.2f} GiB")


if __name__ == "__main__":
    main()
