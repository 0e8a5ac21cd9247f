"""The options that the commands which run a bundle share; each default is that of its dataclass."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hivtp.engines import EngineName
from hivtp.engines.base import Precision
from hivtp.runtime.cli.interrupts import INTERRUPTS
from hivtp.runtime.language.options import BackendName, LanguageDtype, LanguageOptions
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.vision.options import VisionOptions

if TYPE_CHECKING:
    from hivtp.runtime.pipeline import Pipeline


# The key of a vLLM server: an argument would be seen by everybody on the machine.
LANGUAGE_KEY_VARIABLE = "HIVTP_LANGUAGE_API_KEY"


def make_bundle_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser of a command whose first argument is a bundle."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundle", help="folder that hivtp export wrote; or owner/name of the Hugging Face hub, which is downloaded"
    )
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add how tokens are chosen."""
    defaults = SamplingParams()
    of_bundle = "default: the checkpoint's generation config"
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="tokens of the answer at most (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"0 always takes the most likely token ({of_bundle}, usually 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the most likely tokens that together reach this probability ({of_bundle})",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"draw from this many most likely tokens; 0 is no limit ({of_bundle})",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help=f"above 1, tokens that occurred become less likely; 1 is none ({of_bundle})",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    group.add_argument("--system", metavar="TEXT", help="system prompt")


def sampling_from(options: argparse.Namespace) -> SamplingParams:
    """What `add_sampling_options` asked for.

    Raises:
        SettingsError: a setting out of its range.
    """
    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add how a bundle is loaded and run."""
    vision, language = VisionOptions(), LanguageOptions()
    group = parser.add_argument_group("bundle")
    group.add_argument("--revision", metavar="REV", help="of owner/name: a branch, tag or commit (default: main)")
    group.add_argument("--check-hashes", action="store_true", help="refuse a bundle whose files were altered")
    group.add_argument(
        "--trust-plans",
        action="store_true",
        help="load TensorRT plans that another machine built; a plan is code, so trust who made it",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads of each engine (default: physical cores)")
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=vision.precision,
        help="for openvino: auto computes in bfloat16 where the processor is made for it, and what decides about "
        "patches in float32; bfloat16 computes all in it (default: %(default)s)",
    )
    group = parser.add_argument_group("vision")
    group.add_argument(
        "--vision-engine",
        choices=(*get_args(EngineName), "transformers"),
        default=vision.engine,
        help="what runs the vision graph; auto takes the first that works here (default: %(default)s)",
    )
    group.add_argument(
        "--max-tiles",
        type=int,
        default=vision.max_tiles,
        metavar="N",
        help="LLaVA-NeXT: refuse an image that becomes more tiles (default: %(default)s)",
    )
    group.add_argument(
        "--max-tiles-per-run",
        type=int,
        default=vision.max_tiles_per_run,
        metavar="N",
        help="tiles in one run of the vision graph; fewer take less memory (default: %(default)s)",
    )
    group = parser.add_argument_group("language")
    group.add_argument(
        "--language-backend",
        choices=get_args(BackendName),
        default=language.backend,
        help="what decodes the answer: onnxruntime and openvino the bundle's decoder, transformers the language "
        "model of the checkpoint, vllm a server of vLLM (default: %(default)s)",
    )
    group.add_argument(
        "--language-device",
        default=language.device,
        metavar="DEVICE",
        help="where the answer is decoded: cpu, cuda, ...; auto takes a GPU where the decoder is made for one and CUDA "
        "works (default: %(default)s)",
    )
    group.add_argument(
        "--language-checkpoint",
        type=Path,
        metavar="DIR",
        help="for transformers: the folder that the bundle was exported from",
    )
    group.add_argument(
        "--language-dtype",
        choices=get_args(LanguageDtype),
        default=language.dtype,
        help="for transformers; for vllm, in which images are sent (default: %(default)s)",
    )
    group.add_argument(
        "--language-url",
        metavar="URL",
        help=f"for vllm: of its server, http://host:8000; a key that it wants is read from {LANGUAGE_KEY_VARIABLE}",
    )
    group.add_argument(
        "--language-model-name", metavar="NAME", help="for vllm: what its server calls the model (default: its first)"
    )


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """Load what `add_model_options` asked for; see `Pipeline.load` for the errors."""
    from hivtp.runtime.pipeline import Pipeline

    # Where neither is openvino, the vision options say that precision is of no use.
    is_for_language_alone = options.language_backend == "openvino" != options.vision_engine
    pipeline = Pipeline.load(
        options.bundle,
        vision=VisionOptions(
            engine=options.vision_engine,
            num_threads=options.threads,
            max_tiles=options.max_tiles,
            max_tiles_per_run=options.max_tiles_per_run,
            precision=VisionOptions.precision if is_for_language_alone else options.precision,
        ),
        language=LanguageOptions(
            backend=options.language_backend,
            device=options.language_device,
            num_threads=options.threads,
            checkpoint=options.language_checkpoint,
            dtype=options.language_dtype,
            url=options.language_url,
            api_key=os.environ.get(LANGUAGE_KEY_VARIABLE) or None if options.language_backend == "vllm" else None,
            model_name=options.language_model_name,
            precision=options.precision if options.language_backend == "openvino" else LanguageOptions.precision,
        ),
        revision=options.revision,
        check_hashes=options.check_hashes,
        trust_plans=options.trust_plans,
    )
    try:
        INTERRUPTS.check()
    except KeyboardInterrupt:
        pipeline.close()
        raise
    return pipeline
