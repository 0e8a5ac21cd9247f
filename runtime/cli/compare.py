"""hivtp compare: bundles and engines side by side on a user's own images."""

from __future__ import annotations

import json
import statistics
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.runtime.cli.files import read_image
from hivtp.runtime.cli.options import make_bundle_parser
from hivtp.runtime.integrations.polygraphy.comparison import ALL_ENGINES, CompareSettings, Measurement, RunnerSettings
from hivtp_ops.errors import EngineError, VerificationError

if TYPE_CHECKING:
    import argparse

    from hivtp.runtime.integrations.polygraphy.comparison import Comparison, System

DESCRIPTION = """\
Run the vision graph of a bundle in every engine that works here, on images of yours, and compare the engines: which
patches they keep, how far their embeddings and scores are apart, and how fast they are. Bundles of one checkpoint are
compared in the same way. The first engine that runs the first bundle is the reference. Needs hivtp[compare].

The exit code is 1 where a comparison is beyond its tolerance, or an engine named with --engines cannot run.
"""
EXAMPLES = """\
examples:
  hivtp compare bundle *.jpg
  hivtp compare bundle photo.jpg --engines onnxruntime,transformers --checkpoint llava-1.5-7b-hf
  hivtp compare bundle-fp32 *.jpg --bundle bundle-fp16 --bundle bundle-int8 --engines onnxruntime --json
"""
HEADER = (
    *("bundle", "graph", "engine", "tokens", "kept sets", "worst tile"),
    *("embeddings", "median token", "scores", "ms", "min ms", "peak MB"),
)
# The columns of words; the others hold numbers.
NUM_NAMES = 3
LEGEND = """\
tokens      visual tokens kept of an image, over all its tiles
kept sets   patches that both keep over patches that either keeps: the mean over tiles, and the worst tile
embeddings  relative error where both keep a patch, of the worst image; and of the median token
scores      error of the scores over how much they differ between the patches of a tile, of the worst tile
ms          of the vision graph for an image: the median of the rounds, and the minimum
peak MB     host memory that opening the engine and its first runs took; the first of a library pays for loading it"""


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line; defaults come from CompareSettings."""
    defaults = CompareSettings()
    parser = make_bundle_parser(program, DESCRIPTION, EXAMPLES)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, like those that you will ask about")
    parser.add_argument(
        "--bundle",
        action="append",
        default=[],
        dest="others",
        metavar="OTHER",
        help="another bundle of the same checkpoint; repeatable",
    )
    parser.add_argument(
        "--engines",
        metavar="NAMES",
        help=f"names with commas between them, of: {', '.join(ALL_ENGINES)} (default: all); those of polygraphy are "
        "its own runners on the same graph or plan",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=defaults.rounds,
        metavar="N",
        help="how often each image is timed in each engine, in turns (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")
    group = parser.add_argument_group("tolerance", "by default what the bundles were checked with at export")
    group.add_argument(
        "--min-kept-agreement",
        type=float,
        metavar="X",
        help="kept patches of both over those of either, the mean over tiles",
    )
    group.add_argument(
        "--max-embeddings-error",
        type=float,
        metavar="X",
        help="relative error of the embeddings of the patches that both keep, the worst image",
    )
    group.add_argument(
        "--max-score-error",
        type=float,
        metavar="X",
        help="error of the scores over how much they differ between the patches of a tile, the worst tile",
    )
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="for transformers: the folder that the bundle was exported from",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of hivtp's own engines but transformers (default: physical cores)",
    )
    group.add_argument(
        "--trust-plans",
        action="store_true",
        help="load TensorRT plans that another machine built; a plan is code, so trust who made it",
    )
    return parser


def settings_from(options: argparse.Namespace) -> CompareSettings:
    """What the command line asked for.

    Raises:
        SettingsError: there is no such engine, or a setting is out of its range.
    """
    bounds = {
        "min_jaccard": options.min_kept_agreement,
        "relative_error": options.max_embeddings_error,
        "importance_error": options.max_score_error,
    }
    return CompareSettings(
        engines=ALL_ENGINES if options.engines is None else tuple(options.engines.split(",")),
        rounds=options.rounds,
        bounds={name: bound for name, bound in bounds.items() if bound is not None},
        runner=RunnerSettings(options.checkpoint, options.threads, options.trust_plans),
    )


def run(options: argparse.Namespace) -> None:
    """Compare, print what was found, and fail where it is beyond the tolerance.

    Raises:
        VerificationError: a comparison is beyond its tolerance.
        EngineError: an engine that was named cannot run.
    """
    from PIL import Image

    from hivtp.runtime.integrations.polygraphy.side_by_side import compare_bundles

    # load_image refuses what is too large, in words; Pillow's warning would add two lines of its own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    settings = settings_from(options)
    images = [read_image(file) for file in options.images]
    comparison = compare_bundles([options.bundle, *options.others], images, settings)
    print(json.dumps(comparison.to_dict()) if options.json else report(comparison), flush=True)
    if comparison.problems:
        num_compared = sum(isinstance(system.result, Measurement) for system in comparison.systems) - 1
        raise VerificationError(f"{len(comparison.problems)} of {num_compared} comparisons are beyond their tolerance")
    failed = [system.name for system in comparison.systems if isinstance(system.result, str)]
    if failed and options.engines is not None:
        raise EngineError(f"cannot run here: {', '.join(failed)}")


def report(comparison: Comparison) -> str:
    """A table of what was measured, then what could not run and what is beyond its tolerance, for people."""
    rows = [row(system) for system in comparison.systems if isinstance(system.result, Measurement)]
    lines = [*aligned([HEADER, *rows]), "", LEGEND]
    # Most reasons are those of the machine, and the same for every bundle.
    reasons = dict.fromkeys(
        f"{system.engine}: {system.result}" for system in comparison.systems if isinstance(system.result, str)
    )
    for title, items in (("cannot run here", reasons), ("beyond the tolerance", comparison.problems)):
        if items:
            lines += ["", f"{title}:", *(f"  {item}" for item in items)]
    return "\n".join(lines)


def row(system: System) -> tuple[str, ...]:
    """A system's line of the table."""
    result = system.result
    assert isinstance(result, Measurement), "what could not run has no line"
    found = result.agreement
    agreement = ("reference", "", "", "", "")
    if found is not None:
        score = "-" if found.importance_error is None else f"{found.importance_error:.1e}"
        errors = (f"{found.relative_error:.1e}", f"{found.median_row_error:.1e}", score)
        agreement = (f"{found.kept_jaccard:.3f}", f"{found.worst_jaccard:.3f}", *errors)
    return (
        system.bundle.name or str(system.bundle),
        system.precision,
        system.engine,
        f"{statistics.fmean(result.kept_tokens):.1f}",
        *agreement,
        f"{statistics.median(result.round_ms):.1f}",
        f"{min(result.round_ms):.1f}",
        "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}",
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines whose columns are as wide as they must be: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        padded = [
            cell.ljust(width) if place < NUM_NAMES else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
