"""hivtp plan: a TensorRT plan for a bundle, built on the machine that runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hivtp.engines.tensorrt.builder import MAX_OPTIMIZATION_LEVEL
from hivtp.engines.tensorrt.library import LibraryName
from hivtp.engines.tensorrt.profile import TileProfile
from hivtp.export.plan import PlanSettings, export_plan
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from hivtp.engines.tensorrt.plan_record import PlanRecord

DESCRIPTION = """\
Build a TensorRT engine of a bundle's vision graph, compare it with the graph, and put it into the bundle as a plan.
tensorrt builds on the GPU that will run the plan; tensorrt-rtx builds anywhere, for RTX GPUs since Ampere.
"""
EXAMPLES = """\
examples:
  hivtp plan bundle --engine tensorrt
  hivtp plan bundle --engine tensorrt --tiles 1:1:4 --tiles 5    fast for one tile, and for five
"""
GIB = 2**30
MAX_WORKSPACE_GIB = 2**20


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line; defaults come from PlanSettings."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="folder that hivtp export wrote")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    parser.add_argument(
        "--engine",
        choices=get_args(LibraryName),
        required=True,
        help="tensorrt builds on and for this GPU; tensorrt-rtx for any RTX GPU",
    )
    parser.add_argument(
        "--tiles",
        action="append",
        metavar="MIN:OPT:MAX",
        help="tiles of one run: fewest, the number to be fast for, most; or one number for all three; may be repeated, "
        "and together they take every number from 1 up (default: 1:1:8; LLaVA-NeXT: all tiles of one image)",
    )
    parser.add_argument(
        "--workspace-gib", type=float, metavar="N", help="most GPU memory for intermediate results (default: all)"
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        default=PlanSettings.optimization_level,
        metavar="N",
        help=f"0 builds fastest, {MAX_OPTIMIZATION_LEVEL} tries most (default: %(default)s)",
    )
    parser.add_argument("--no-tf32", action="store_true", help="full float32 in a float32 graph, which is slow")
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="DIR",
        help="where TensorRT's measurements are kept (default: the user's cache)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Build the plan, and say what it is."""
    print(plan_summary(*export_plan(options.bundle, settings_from(options), is_quiet=options.quiet)))


def settings_from(options: argparse.Namespace) -> PlanSettings:
    """The settings that a command line asks for.

    Raises:
        EngineError: a value that cannot be.
    """
    if options.workspace_gib is not None and not 0 < options.workspace_gib < MAX_WORKSPACE_GIB:
        raise EngineError(f"--workspace-gib is {options.workspace_gib}; give more than 0, or leave it to TensorRT")
    return PlanSettings(
        options.engine,
        profiles=tuple(map(TileProfile.parse, options.tiles or ())),
        workspace_bytes=None if options.workspace_gib is None else int(options.workspace_gib * GIB),
        optimization_level=options.optimization_level,
        allows_tf32=not options.no_tf32,
        timing_cache=options.timing_cache,
    )


def _generation(record: PlanRecord) -> str:
    return "Ada" if record.precision == "fp8" else "Ampere"


def plan_summary(file: Path, record: PlanRecord) -> str:
    """What was built, for which machine, and how close it is to the graph."""
    machine = f"any RTX GPU since {_generation(record)}" if record.is_portable else str(record.gpu)
    pruning = {None: "nothing is pruned", "plugin": "pruning by the plugin", "function": "pruning by standard layers"}
    found = record.verification
    lines = [
        f"wrote {file}",
        f"  engine    {record.library} {record.library_version}, for {machine}",
        f"  graph     {record.precision}, {record.plan.num_bytes / 1e6:.1f} MB, {pruning[record.pruning]}",
        f"  tiles     {', '.join(record.profiles)}",
    ]
    if not found["is_done"]:
        lines.append(f"  check     NOT DONE: {found['reason']}; build it again on the GPU to compare it with the graph")
        return "\n".join(lines)
    checks = [f"relative error {found['relative_error']:.1e} (allowed {found['tolerance']['relative_error']:.0e})"]
    if found["kept_jaccard"] is not None:
        checks.append(f"kept-token agreement {found['kept_jaccard']:.1%}")
    lines.append(f"  check     {', '.join(checks)}")
    return "\n".join(lines)
