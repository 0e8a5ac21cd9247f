"""hivtp-run: ask a bundle about images."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.answer_stream import AnswerStream
    from hivtp.runtime.pipeline import Pipeline

DESCRIPTION = "Ask a bundle, written by hivtp-export, about one or several images. The answer streams as it comes."
EXAMPLES = """\
examples:
  hivtp-run bundle --image photo.jpg "What is in the picture?"
  hivtp-run bundle --image photo.jpg "What is in the picture?" --overlay kept.png
  hivtp-run bundle --image a.jpg --image b.jpg "Is <image> brighter than <image>?" --json
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line; defaults come from the settings of each layer."""
    from hivtp.engines import EngineName
    from hivtp.runtime.language.settings import BackendName, LanguageDtype, LanguageSettings
    from hivtp.runtime.request import DEFAULT_MAX_NEW_TOKENS
    from hivtp.runtime.sampling import SamplingSettings
    from hivtp.runtime.tiling import MAX_TILES
    from hivtp.runtime.vision import DEFAULT_MAX_TILES_PER_RUN

    sampling = SamplingSettings()
    parser = argparse.ArgumentParser(
        prog="hivtp-run",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="folder that hivtp-export wrote")
    parser.add_argument("prompt", help="the question; <image> marks say where several images stand in it")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file; may be repeated")
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=sampling.temperature,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    parser.add_argument("--top-p", type=float, default=sampling.top_p, metavar="P", help="default: %(default)s")
    parser.add_argument(
        "--top-k", type=int, default=sampling.top_k, metavar="K", help="0 is no limit (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=sampling.seed, metavar="N", help="makes sampling repeatable")
    parser.add_argument("--check-hashes", action="store_true", help="refuse a bundle whose files were altered")
    parser.add_argument(
        "--engine",
        choices=get_args(EngineName),
        default="auto",
        help="what runs the vision graph; auto takes the fastest that works here (default: %(default)s)",
    )
    parser.add_argument(
        "--vision-compile",
        action="store_true",
        help="for torch and torch-cuda: run the graph compiled, which takes up to a minute to begin with",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the engine (default: its own choice)")
    parser.add_argument(
        "--max-tiles",
        type=int,
        default=MAX_TILES,
        metavar="N",
        help="LLaVA-NeXT: refuse a picture that becomes more tiles (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tiles-per-run",
        type=int,
        default=DEFAULT_MAX_TILES_PER_RUN,
        metavar="N",
        help="tiles in one run of the vision graph; fewer take less memory (default: %(default)s)",
    )
    parser.add_argument(
        "--language",
        choices=get_args(BackendName),
        default=LanguageSettings.backend,
        help="what decodes the answer: onnxruntime the bundle's decoder, transformers the language model of the "
        "checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="for transformers: the folder that the bundle was exported from"
    )
    parser.add_argument(
        "--language-device",
        default=LanguageSettings.device,
        metavar="DEVICE",
        help="where the answer is decoded: cpu, cuda, ...; auto takes a GPU where the decoder is made for one and CUDA "
        "works (default: %(default)s)",
    )
    parser.add_argument(
        "--language-dtype",
        choices=get_args(LanguageDtype),
        default=LanguageSettings.dtype,
        help="for transformers (default: %(default)s)",
    )
    parser.add_argument(
        "--language-compile",
        action="store_true",
        help="for transformers: run the model compiled, which takes up to minutes to begin with",
    )
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="write a picture of the kept tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 after an error, 130 after Ctrl-C, 141 where the reader has left."""
    options = make_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write any character, and a terminal need not know them all.
        sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            _run(options)
    except HivtpError as error:
        print(f"hivtp-run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhivtp-run: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # As `head` does. Python would fail once more on what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _run(options: argparse.Namespace) -> None:
    from PIL import Image

    from hivtp.runtime.pipeline import Pipeline

    # load_image refuses what is too large, in words; Pillow's warning would add two lines of its own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if options.overlay is not None:
        check_overlay(options.overlay, options.image)
    pipeline = Pipeline.load(
        options.bundle,
        engine=options.engine,
        vision_compile=options.vision_compile,
        num_threads=options.threads,
        check_hashes=options.check_hashes,
        max_tiles_per_run=options.max_tiles_per_run,
        max_tiles=options.max_tiles,
        language=options.language,
        checkpoint=options.checkpoint,
        language_device=options.language_device,
        language_dtype=options.language_dtype,
        language_compile=options.language_compile,
    )
    stream = pipeline.stream(
        options.prompt,
        options.image,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    for piece in stream:
        if not options.json:
            print(piece, end="", flush=True)
    if options.json:
        print(json.dumps(stream.answer.to_dict()), flush=True)
    else:
        print(f"\n\n{report(stream.answer)}", flush=True)
    if options.overlay is not None:
        for path in write_overlays(pipeline, stream, options.image, options.overlay):
            print(f"wrote {path}", file=sys.stderr)


def show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
    """Print a warning as the command's own line, without the place in the code that Python names."""
    print(f"hivtp-run: {message}", file=sys.stderr)


def report(answer: Answer) -> str:
    """Counts and timings of an answer, for people."""
    timings = answer.timings
    decode = timings.decode_ms_per_token
    lines = [
        f"visual tokens  {answer.num_image_tokens} -> {answer.num_kept_tokens}",
        f"preprocess     {timings.preprocess_ms:8.1f} ms",
        f"vision         {timings.vision_ms:8.1f} ms",
        f"prefill        {timings.prefill_ms:8.1f} ms",
        f"first token    {timings.ttft_ms:8.1f} ms",
        f"decode         {decode:8.1f} ms per token" if decode is not None else "decode                - (one token)",
        f"{len(answer.token_ids)} tokens, finished by {answer.finish_reason}",
    ]
    return "\n".join(lines)


def check_overlay(target: Path, images: Sequence[Path]) -> None:
    """Refuse a picture of the kept tokens that could not be written, before the model runs.

    Raises:
        ImageError: there is no image to draw on, or no folder to write to, or the name is not a picture's.
    """
    from PIL import Image

    from hivtp_ops.errors import ImageError

    if not images:
        raise ImageError("--overlay needs an --image to draw on")
    if not target.parent.is_dir():
        raise ImageError(f"cannot write {target}: {target.parent} is not a folder")
    if target.suffix.lower() not in Image.registered_extensions():
        raise ImageError(f"cannot write {target}: no image format goes by that name; give a path that ends in .png")


def write_overlays(pipeline: Pipeline, stream: AnswerStream, images: Sequence[Path], target: Path) -> list[Path]:
    """Write a picture of the kept tokens of each image: `target`, or numbered beside it where there are several.

    Raises:
        ImageError: a picture cannot be written.
    """
    from hivtp.runtime.images import load_image
    from hivtp.runtime.overlay import draw_tiles
    from hivtp_ops.errors import ImageError

    manifest = pipeline.bundle.manifest
    written = []
    for number, (image, encoded) in enumerate(zip(images, stream.images, strict=True), start=1):
        frames = pipeline.images.frames(load_image(image))
        overlay = draw_tiles(frames, encoded.tiles, manifest.vision.grid, manifest.pruning)
        path = target if len(images) == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        try:
            overlay.save(path)
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot write {path}: {error}; give a path that ends in .png") from error
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main())
