"""A second decoder for the prefill against one decoder for all, in one run: `python -m benchmarks.speed.prefill`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.speed.ttft import open_bundle
from benchmarks.timing.harness import measure
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_length, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

BASELINE = "int4"
INT4 = ExportSettings(preset="192", vision_precision="int8", language_precision="int4")
# By the precision of the decoder; the vision graph is int8, and 192 of its 576 tokens stay.
BUNDLES = {
    BASELINE: INT4,
    "int4 in blocks of 128": replace(INT4, block_size=128),
    "int4, prefill in w8a8": replace(INT4, prefill_precision="w8a8"),
    "int4 in blocks of 128, prefill in w8a8": replace(INT4, block_size=128, prefill_precision="w8a8"),
    "int8": replace(INT4, language_precision="int8"),
    "w8a8": replace(INT4, language_precision="w8a8"),
}
QUANTITIES = {"prefill": "prefill_ms", "time to first token": "ttft_ms", "decode per token": "decode_ms_per_token"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "prefill.json")
    add_length(parser, 8)
    others = [name for name in BUNDLES if name != BASELINE]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=others,
        default=others,
        metavar="NAME",
        help="what to compare with one int4 decoder, of %(choices)s (default: all); each holds its own in memory",
    )
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "prefill")
    bundles = workspace.bundles({name: BUNDLES[name] for name in (BASELINE, *options.only)})
    systems = [
        System(name, open_bundle, {"bundle": bundle, "num_new_tokens": options.new_tokens})
        for name, bundle in bundles.items()
    ]
    results = measure(systems, options.rounds, options.threads)
    tables = {
        title: [Row.of(results, name, quantity, BASELINE) for name in bundles] for title, quantity in QUANTITIES.items()
    }
    report(options, tables, {"answers": results})


if __name__ == "__main__":
    main()
