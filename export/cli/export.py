"""hivtp export: from a Hugging Face checkpoint to a bundle; `hivtp-export` is the same command."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, get_args

from hivtp.engines.tensorrt.library import LibraryName
from hivtp.export.checkpoint.original_layout.conversations import CONVERSATIONS
from hivtp.export.cli.plan import plan_summary
from hivtp.export.decoder.build import BLOCK_SIZES, DEFAULT_BLOCK_SIZE, DEFAULT_ROUNDING, PrefillPrecision, Rounding
from hivtp.export.exporter import export_bundle
from hivtp.export.graph.builder import VisionPrecision
from hivtp.export.graph.vision import GraphKind
from hivtp.export.language import LanguagePrecision
from hivtp.export.layers.choice import choose_layers
from hivtp.export.layers.ranking import ChoiceSettings
from hivtp.export.plan import Builder, PlanSettings, export_plan
from hivtp.export.settings import ExportSettings, NewlineRule
from hivtp.export.summary import summary
from hivtp.export.targets import TARGETS, settings_for
from hivtp_ops.errors import EngineError, HivtpError, SpecError
from hivtp_ops.spec import PRESETS, PruningSpec

DESCRIPTION = """\
Turn a LLaVA checkpoint (1.5, NeXT, OneVision; docs/checkpoints.md) into a bundle: a folder with the vision graph,
HIVTP token pruning inside it, and the language model, all ONNX. Before the bundle appears, every graph is compared
with PyTorch, and the bundle is opened and asked about an image. Run a bundle with hivtp run.
"""
EXAMPLES = """\
examples:
  hivtp-export llava-1.5-7b-hf bundle                            the paper's pruning, float32
  hivtp-export llava-hf/llava-1.5-7b-hf bundle                   the same, downloaded from the Hugging Face hub
  hivtp-export llava-1.5-7b-hf bundle --preset 192 --target cpu  fastest on a CPU
  hivtp-export llava-1.5-7b-hf bundle --no-pruning               all 576 tokens, to compare with
  hivtp-export llava-1.5-7b-hf bundle --window 3 --keep 150      a rule of your own
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp16 \\
      --engine tensorrt                                          with a TensorRT plan for this GPU
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp8 \\
      --calibration-images *.jpg --engine tensorrt               the same in fp8, on Ada, Hopper or Blackwell
  hivtp-export llava-1.5-7b-hf bundle --vision-precision fp16 \\
      --language-precision fp16                                  all of it on a GPU
  hivtp-export llava-1.5-7b-hf bundle --language-precision none  no decoder, to answer in transformers
  hivtp-export llava-1.5-7b-hf --preset 192 --choose-layers *.jpg
                                                                 which layers should score your images: hivtp layers
"""
# The rule's settings, by the option that gives each.
SPEC_OPTIONS = ("regions", "global_ratio", "window", "keep")


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line; defaults come from ExportSettings and PruningSpec."""
    defaults = ExportSettings()
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="folder to write; it appears when it is whole; none with --choose-layers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle, in one step")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")

    add_pruning_options(parser)
    tiles = parser.add_argument_group("LLaVA-NeXT and OneVision, which cut images into tiles; presets count per tile")
    tiles.add_argument(
        "--keep-total",
        type=int,
        metavar="N",
        help="one budget of tokens over all tiles of an image, newlines not counted",
    )
    tiles.add_argument(
        "--newline",
        choices=get_args(NewlineRule),
        default=defaults.newline,
        help="rows of patches that end with a newline token (default: %(default)s)",
    )

    precision = parser.add_argument_group("precision and graph")
    purposes = "; ".join(f"{name}: {target.purpose}" for name, target in TARGETS.items())
    precision.add_argument(
        "--target",
        choices=TARGETS,
        help=f"where the bundle will run, which picks the precisions that are not given: {purposes} (default: none)",
    )
    precision.add_argument(
        "--vision-precision",
        choices=get_args(VisionPrecision),
        help="int8 is fastest on a CPU; fp16 and fp8 are for a GPU, fp8 for TensorRT on Ada, Hopper and later "
        f"(default: the target's, or {defaults.vision_precision})",
    )
    precision.add_argument(
        "--calibration-images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="for fp8: images like those that you will ask about; their activations set its scales",
    )
    precision.add_argument(
        "--language-precision",
        choices=get_args(LanguagePrecision),
        help="of the decoder: fp32, int8, int4 and w8a8 are for a CPU, fp16 and int4-fp16 for a GPU; none writes no "
        "decoder, for hivtp run --language-backend transformers (default: the target's, or "
        f"{defaults.language_precision})",
    )
    precision.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="weights of an int8 or int4 decoder that share a scale; 128 is faster than the default and rounds more "
        f"coarsely; the summary says by how much (default: the target's, or {DEFAULT_BLOCK_SIZE})",
    )
    precision.add_argument(
        "--prefill-precision",
        choices=get_args(PrefillPrecision),
        help="write a prefill decoder, a second one that runs the prompts: w8a8 halves the time of an int4 prefill on "
        "a CPU, for one byte more per weight (default: the target's, or one decoder runs both)",
    )
    precision.add_argument(
        "--language-rounding",
        choices=get_args(Rounding),
        help="of int4 and w8a8: calibrated reads a text with the model first, and rounds so that what the model "
        "computes stays close (GPTQ, SmoothQuant); plain rounds to the nearest, in less time "
        f"(default: {DEFAULT_ROUNDING})",
    )
    precision.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="for calibrated: a text like those that the model will read and write, in UTF-8, of some pages (default: "
        "the help topics of Python)",
    )
    precision.add_argument(
        "--decoder-from",
        type=Path,
        metavar="BUNDLE",
        help="copy the decoders of another bundle of this language model instead of writing them again, to try another "
        "pruning in a fraction of the time",
    )
    precision.add_argument(
        "--graph",
        choices=get_args(GraphKind),
        default=defaults.graph,
        help="vision: a bundle that answers; encoder: only a graph that gives features and the attention of the "
        "scoring layers (default: %(default)s)",
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--engine",
        choices=get_args(LibraryName),
        help="also build a TensorRT plan of the vision graph: tensorrt on and for this GPU, tensorrt-rtx for any RTX "
        "GPU; hivtp plan has more options",
    )
    parser.add_argument(
        "--choose-layers",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="rank the layers that could score these images and write nothing; hivtp layers has more options",
    )
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add which checkpoint."""
    parser.add_argument(
        "checkpoint",
        help="folder with config.json, *.safetensors and tokenizer; or owner/name of the Hugging Face hub, from where "
        "it is downloaded",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add what is taken of a checkpoint where there is a choice."""
    parser.add_argument("--revision", metavar="REV", help="of owner/name: a branch, tag or commit (default: main)")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="which of the checkpoint's chat templates, where it has several"
    )
    parser.add_argument(
        "--conversation",
        choices=CONVERSATIONS,
        help="the form of a conversation, for a checkpoint in the layout of the original LLaVA code (default: by its "
        "kind, vicuna_v1 for a Vicuna)",
    )
    parser.add_argument(
        "--vision-tower",
        type=Path,
        metavar="FOLDER",
        help="the CLIP model of such a checkpoint, where it does not hold its vision tower or names an unknown one",
    )


def add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """Add a preset, or a rule, and its layers."""
    defaults, rule = ExportSettings(), PruningSpec()
    pruning = parser.add_argument_group("pruning, a preset or none")
    choice = pruning.add_mutually_exclusive_group()
    choice.add_argument(
        "--preset",
        choices=PRESETS,
        help="paper keeps 252 to 288 of 576 tokens, by content; a number keeps exactly that many "
        f"(default: {defaults.preset})",
    )
    choice.add_argument("--no-pruning", action="store_true", help="keep every token")

    layers = parser.add_argument_group("pruning, the layers that score the patches, for any preset or rule")
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


def pruning_from(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that `add_pruning_options` asked for.

    Raises:
        SpecError: options that exclude each other, or a spec that cannot work.
    """
    own = {name: getattr(options, name) for name in SPEC_OPTIONS if getattr(options, name) is not None}
    if own and (options.preset or options.no_pruning):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        other = f"--preset {options.preset}" if options.preset else "--no-pruning"
        raise SpecError(f"{flags} make a rule of your own, which excludes {other}; drop one of the two")
    return {
        "preset": options.preset or ExportSettings.preset,
        "spec": PruningSpec(**own) if own else None,
        "first_layer": options.first_layer,
        "num_layers": options.num_layers,
        "is_pruned": not options.no_pruning,
    }


def settings_from(options: argparse.Namespace) -> ExportSettings:
    """The settings that a command line asks for.

    Raises:
        SpecError: options that exclude each other, or a spec that cannot work.
    """
    given: dict[str, Any] = {
        "vision_precision": options.vision_precision,
        "language_precision": options.language_precision,
        "block_size": options.block_size,
        "prefill_precision": options.prefill_precision,
    }
    settings: dict[str, Any] = {
        **pruning_from(options),
        **{name: value for name, value in given.items() if value is not None},
        "calibration": tuple(options.calibration_images or ()),
        "newline": options.newline,
        "keep_total": options.keep_total,
        "graph": options.graph,
        "language_rounding": options.language_rounding,
        "calibration_text": options.calibration_text,
        "decoder_from": options.decoder_from,
        "chat_template": options.chat_template,
        "conversation": options.conversation,
        "vision_tower": options.vision_tower,
        "revision": options.revision,
        "overwrite": options.overwrite,
    }
    return ExportSettings(**settings) if options.target is None else settings_for(options.target, **settings)


def run(options: argparse.Namespace) -> None:
    """Export, say what was written, and build a plan where one is asked for."""
    settings = settings_from(options)
    if options.choose_layers is not None:
        _choose_layers(options, settings)
        return
    if options.bundle is None:
        raise SpecError("no bundle was named; give the folder to write after the checkpoint")
    target = options.target
    library = options.engine or (None if target is None else TARGETS[target].plan_library)
    plan = None if library is None else PlanSettings(library)
    if plan is not None:
        # An export takes minutes; a plan that cannot be built is refused before.
        Builder.find(plan, settings.vision_precision)
    bundle = export_bundle(options.checkpoint, options.bundle, settings, is_quiet=options.quiet)
    # The bundle is whole, whether or not anybody reads the summary.
    with contextlib.suppress(BrokenPipeError):
        print(summary(bundle, options.checkpoint, target), flush=True)
    if plan is None:
        return
    try:
        print(plan_summary(*export_plan(options.bundle, plan, is_quiet=options.quiet)))
    except HivtpError as error:
        raise EngineError(f"the bundle is whole, but has no plan: {error}") from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("the bundle is whole, but has no plan") from stopped


def _choose_layers(options: argparse.Namespace, settings: ExportSettings) -> None:
    if options.bundle is not None or options.engine is not None:
        raise SpecError(
            "--choose-layers writes nothing: leave the bundle and --engine out, then export with the options that it "
            "prints"
        )
    ranking = choose_layers(
        options.checkpoint, options.choose_layers, settings, ChoiceSettings(), is_quiet=options.quiet
    )
    print(ranking.table())
