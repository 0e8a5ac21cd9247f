"""hivtp layers: which layers of the vision tower should score the patches, ranked on a user's own images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from hivtp.export.cli.export import add_checkpoint, add_checkpoint_options, add_pruning_options, pruning_from
from hivtp.export.layers.choice import choose_layers
from hivtp.export.layers.ranking import ChoiceSettings, Criterion
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import SpecError

DESCRIPTION = """\
Rank the layers of a checkpoint's vision tower that could score its patches, on images of yours; they need no labels.
Nothing is written. It prints the options to export with: hivtp export ... --first-layer N --num-layers N.
"""
EXAMPLES = """\
examples:
  hivtp layers llava-1.5-7b-hf *.jpg
  hivtp layers llava-1.5-7b-hf *.jpg --preset 64 --criterion features
"""


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line; defaults come from ChoiceSettings."""
    defaults = ChoiceSettings()
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="images like those that you will ask about"
    )
    parser.add_argument(
        "--criterion",
        choices=get_args(Criterion),
        help="answers: how much the model's answers change; features: how much of the differences between tokens is "
        f"dropped, which needs no language model and says less (default: {defaults.criterion})",
    )
    parser.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help=f"asked about every image; may be repeated (default: {defaults.questions[0]})",
    )
    parser.add_argument(
        "--max-answer-tokens",
        type=int,
        metavar="N",
        help=f"tokens of an answer that are compared (default: {defaults.max_answer_tokens})",
    )
    parser.add_argument("--json", action="store_true", help="print the whole ranking as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="print the ranking only")
    add_checkpoint_options(parser)
    add_pruning_options(parser)
    return parser


def choice_from(options: argparse.Namespace) -> ChoiceSettings:
    """How to rank.

    Raises:
        SpecError: options that exclude each other.
    """
    given: dict[str, Any] = {
        "criterion": options.criterion,
        "questions": tuple(options.question) if options.question else None,
        "max_answer_tokens": options.max_answer_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.criterion == "features" and len(given) > 1:
        raise SpecError("the criterion features asks no questions; leave --question and --max-answer-tokens out")
    return ChoiceSettings(**given)


def run(options: argparse.Namespace) -> None:
    """Rank, and print the ranking."""
    names = ("revision", "chat_template", "conversation", "vision_tower")
    taken = {name: getattr(options, name) for name in names}
    settings, choice = ExportSettings(**pruning_from(options), **taken), choice_from(options)
    ranking = choose_layers(options.checkpoint, options.images, settings, choice, is_quiet=options.quiet)
    print(json.dumps(ranking.to_dict()) if options.json else ranking.table())
