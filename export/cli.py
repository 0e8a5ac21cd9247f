"""hivtp-export: from a Hugging Face checkpoint to a bundle."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hivtp.export.decoder import BLOCK_SIZES, DEFAULT_BLOCK_SIZE, PrefillPrecision
from hivtp.export.exporter import export_bundle
from hivtp.export.graph import VisionPrecision
from hivtp.export.language import LanguagePrecision
from hivtp.export.layer_choice import choose_layers
from hivtp.export.layer_ranking import ChoiceSettings, Criterion
from hivtp.export.plan import Builder, export_plan
from hivtp.export.plan_cli import add_plan_options, make_engine_parser, plan_settings_from, plan_summary
from hivtp.export.settings import ExportSettings, NewlineRule
from hivtp.export.summary import summary
from hivtp.export.vision import GraphKind
from hivtp_ops.errors import EngineError, HivtpError, SpecError
from hivtp_ops.spec import PRESETS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.export.plan import PlanSettings

DESCRIPTION = """\
Turn a LLaVA-1.5 or LLaVA-NeXT checkpoint (Hugging Face format) into a bundle: a folder with the vision graph,
HIVTP token pruning inside it, and the language model, all ONNX. Every graph is compared with PyTorch
before the bundle appears. Run a bundle with hivtp-run.
"""
EXAMPLES = """\
examples:
  hivtp-export llava-1.5-7b-hf bundle                            the paper's pruning, float32
  hivtp-export llava-1.5-7b-hf bundle --preset 192 \\
      --vision-precision int8 --language-precision int4          small and fast on a CPU
  hivtp-export llava-1.5-7b-hf bundle --no-pruning               all 576 tokens, to compare with
  hivtp-export llava-1.5-7b-hf bundle --window 3 --keep 150      a rule of your own
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp16 \\
      --engine tensorrt                                          with a TensorRT plan for this GPU
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp8 \\
      --calibration-pictures *.jpg --engine tensorrt             the same in fp8, on Ada, Hopper or Blackwell
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp16 \\
      --language-precision fp16                                  all of it on a GPU
  hivtp-export llava-1.5-7b-hf bundle --language-precision none  no decoder, to answer in transformers
  hivtp-export engine bundle --engine tensorrt                   a TensorRT plan for a bundle that is there already
  hivtp-export llava-1.5-7b-hf --preset 192 --choose-layers *.jpg
                                                                 which layers should score your pictures
"""
# The rule's settings, by the option that gives each.
SPEC_OPTIONS = ("regions", "global_ratio", "window", "keep")


def make_parser() -> argparse.ArgumentParser:
    """The command line; defaults come from ExportSettings and PruningSpec."""
    defaults, rule = ExportSettings(), PruningSpec()
    parser = argparse.ArgumentParser(
        prog="hivtp-export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint: config.json, *.safetensors, tokenizer")
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="folder to write; whole when it appears; none with --choose-layers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")

    pruning = parser.add_argument_group("pruning, a preset or none")
    choice = pruning.add_mutually_exclusive_group()
    choice.add_argument(
        "--preset",
        choices=PRESETS,
        help="paper keeps 252 to 288 of 576 tokens, by content; a number keeps exactly that many "
        f"(default: {defaults.preset})",
    )
    choice.add_argument("--no-pruning", action="store_true", help="keep every token")

    layers = parser.add_argument_group("pruning, the layers that score, for any preset or rule")
    layers.add_argument("--first-layer", type=int, metavar="N", help="first scoring layer, 0-based (default: 6 of 24)")
    layers.add_argument("--num-layers", type=int, metavar="N", help="number of scoring layers (default: 3 of 24)")

    own = parser.add_argument_group("pruning, a rule of your own (starts from the paper's)")
    own.add_argument("--regions", type=int, metavar="N", help=f"regions per axis (default: {rule.regions})")
    own.add_argument(
        "--global-ratio",
        type=float,
        metavar="R",
        help=f"share kept in each region, 0 to 1 (default: {rule.global_ratio})",
    )
    own.add_argument("--window", type=int, metavar="N", help=f"side of a local window (default: {rule.window})")
    own.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="exact number of tokens per image (default: what the rule gives)",
    )

    tiles = parser.add_argument_group("LLaVA-NeXT, whose pictures are cut into tiles; presets count per tile")
    tiles.add_argument(
        "--keep-total",
        type=int,
        metavar="N",
        help="one budget of tokens over all tiles of a picture, newlines not counted",
    )
    tiles.add_argument(
        "--newline",
        choices=get_args(NewlineRule),
        default=defaults.newline,
        help="picture rows that end with a newline token (default: %(default)s)",
    )

    precision = parser.add_argument_group("precision and graph")
    precision.add_argument(
        "--vision-precision",
        choices=get_args(VisionPrecision),
        default=defaults.vision_precision,
        help="int8 is fastest on a CPU, fp16, bf16 and fp8 are meant for a GPU: bf16 runs on a CPU in torch alone, and "
        "fp8 is for TensorRT on Ada, Hopper and later (default: %(default)s)",
    )
    precision.add_argument(
        "--calibration-pictures",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="for fp8: pictures like those that the model is meant for, whose activations it is scaled to",
    )
    precision.add_argument(
        "--language-precision",
        choices=get_args(LanguagePrecision),
        default=defaults.language_precision,
        help="what the decoder computes in: fp32, int8, int4 and w8a8 are for a CPU, fp16 and int4-fp16 for a GPU; "
        "none leaves it out, for hivtp-run --language transformers (default: %(default)s)",
    )
    precision.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="weights of an int8 or int4 decoder that share a scale; 128 answers sooner than the default, and rounds "
        f"more coarsely, by as much as the summary says (default: {DEFAULT_BLOCK_SIZE})",
    )
    precision.add_argument(
        "--prefill-precision",
        choices=get_args(PrefillPrecision),
        help="write a second decoder, which runs the prompts: w8a8 halves the time of an int4 prefill on a CPU, for "
        "one byte more per weight; the summary says what it rounds (default: one decoder runs all)",
    )
    precision.add_argument(
        "--decoder-from",
        type=Path,
        metavar="BUNDLE",
        help="take the decoder of another bundle with this language model, and the one for prompts with it, instead of "
        "writing them again, to try another pruning in a fraction of the time",
    )
    precision.add_argument(
        "--graph",
        choices=get_args(GraphKind),
        default=defaults.graph,
        help="vision: a bundle that answers; encoder: only the graph that emits features and middle-layer "
        "attention (default: %(default)s)",
    )
    add_plan_options(parser)
    _add_choice(parser)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    defaults = ChoiceSettings()
    choice = parser.add_argument_group("choice of the scoring layers, in place of an export (docs/choosing-layers.md)")
    choice.add_argument(
        "--choose-layers",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="rank the layers that could score, for the pruning above, on pictures of yours; they need no labels",
    )
    choice.add_argument(
        "--criterion",
        choices=get_args(Criterion),
        help="answers: how much the model's answers change; features: how much is dropped of what tells the tokens "
        f"apart, which needs no language model and says less (default: {defaults.criterion})",
    )
    choice.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help=f"asked about every picture; may be repeated (default: {defaults.questions[0]})",
    )
    choice.add_argument(
        "--max-answer-tokens",
        type=int,
        metavar="N",
        help=f"tokens of an answer that are compared (default: {defaults.max_answer_tokens})",
    )
    choice.add_argument("--json", action="store_true", help="print the whole ranking as one JSON object")


def settings_from(options: argparse.Namespace) -> ExportSettings:
    """The settings that a command line asks for.

    Raises:
        SpecError: options that exclude each other, or a spec that cannot work.
    """
    own = {name: getattr(options, name) for name in SPEC_OPTIONS if getattr(options, name) is not None}
    if own and (options.preset or options.no_pruning):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        other = f"--preset {options.preset}" if options.preset else "--no-pruning"
        raise SpecError(f"{flags} make a rule of your own and cannot go with {other}; drop one of the two")
    return ExportSettings(
        preset=options.preset or ExportSettings.preset,
        spec=PruningSpec(**own) if own else None,
        first_layer=options.first_layer,
        num_layers=options.num_layers,
        is_pruned=not options.no_pruning,
        vision_precision=options.vision_precision,
        calibration=tuple(options.calibration_pictures or ()),
        language_precision=options.language_precision,
        block_size=options.block_size,
        prefill_precision=options.prefill_precision,
        newline=options.newline,
        keep_total=options.keep_total,
        graph=options.graph,
        decoder_from=options.decoder_from,
        overwrite=options.overwrite,
    )


def choice_from(options: argparse.Namespace) -> ChoiceSettings | None:
    """How to choose layers, where the command line asks for that; None where it asks for an export.

    Raises:
        SpecError: options that exclude or need each other.
    """
    given = {
        "criterion": options.criterion,
        "questions": tuple(options.question) if options.question else None,
        "max_answer_tokens": options.max_answer_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.choose_layers is None:
        if given or options.json:
            raise SpecError("--criterion, --question, --max-answer-tokens and --json go with --choose-layers")
        if options.bundle is None:
            raise SpecError("no bundle was named; give the folder to write after the checkpoint")
        return None
    if options.bundle is not None:
        raise SpecError(f"--choose-layers writes nothing; leave {options.bundle} out, then export with what it prints")
    if options.criterion == "features" and len(given) > 1:
        raise SpecError("features are judged without questions; leave --question and --max-answer-tokens out")
    return ChoiceSettings(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 after an error, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            # The name of a checkpoint in this place is written ./engine.
            if arguments[:1] == ["engine"]:
                _export_plan(make_engine_parser().parse_args(arguments[1:]))
            else:
                # Options may stand between the checkpoint and the bundle, which argparse alone does not take of an
                # optional one.
                _export(make_parser().parse_intermixed_args(arguments))
    except HivtpError as error:
        print(f"hivtp-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"\nhivtp-export: stopped; {str(stopped) or 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


def _export(options: argparse.Namespace) -> None:
    settings, plan, choice = settings_from(options), plan_settings_from(options), choice_from(options)
    if choice is not None:
        if plan is not None:
            raise SpecError("--choose-layers writes nothing, so there is no plan to build; leave --engine out")
        ranking = choose_layers(options.checkpoint, options.choose_layers, settings, choice, is_quiet=options.quiet)
        print(json.dumps(ranking.to_dict()) if options.json else ranking.table())
        return
    if plan is not None:
        # An export takes minutes; what the plan lacks is better known before.
        Builder.find(plan, settings.vision_precision)
    bundle = export_bundle(options.checkpoint, options.bundle, settings, is_quiet=options.quiet)
    print(summary(bundle, options.checkpoint), flush=True)
    if plan is None:
        return
    try:
        _report_plan(options.bundle, plan, options.quiet)
    except HivtpError as error:
        raise EngineError(f"the bundle is whole, and without a plan: {error}") from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("the bundle is whole, and without a plan") from stopped


def _export_plan(options: argparse.Namespace) -> None:
    settings = plan_settings_from(options)
    assert settings is not None, "the parser demands an engine"
    _report_plan(options.bundle, settings, options.quiet)


def _report_plan(bundle: Path, settings: PlanSettings, is_quiet: bool) -> None:
    print(plan_summary(*export_plan(bundle, settings, is_quiet=is_quiet)))


def show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
    """Print a warning as the command's own line, without the place in the code that Python names."""
    print(f"hivtp-export: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
