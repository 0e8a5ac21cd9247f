"""hivtp run: ask a bundle about images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.runtime.cli.console import shown
from hivtp.runtime.cli.options import (
    add_model_options,
    add_sampling_options,
    load_pipeline,
    make_bundle_parser,
    sampling_from,
)

if TYPE_CHECKING:
    import argparse

    from hivtp.runtime.answer import Answer

DESCRIPTION = "Ask a bundle that hivtp export wrote about one or several images. The answer streams."
EXAMPLES = """\
examples:
  hivtp run bundle --image photo.jpg "What is in the image?"
  hivtp run bundle --image photo.jpg "What is in the image?" --overlay kept.png
  hivtp run bundle --image a.jpg --image b.jpg "Is <image> brighter than <image>?" --json
  curl -s https://example.org/photo.jpg | hivtp run bundle --image - "What is in the image?"
"""


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_bundle_parser(program, DESCRIPTION, EXAMPLES)
    parser.add_argument("prompt", help="the question; <image> marks say where several images stand in it")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image file, or - for standard input; repeatable",
    )
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="write the image with its kept patches marked")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Answer, then report, then draw."""
    from hivtp.runtime.cli.files import check_images, check_overlay, read_image, write_overlays

    if options.overlay is not None:
        check_overlay(options.overlay, options.image)
    sampling = sampling_from(options)
    images = [read_image(file) for file in options.image]
    check_images(images)
    with load_pipeline(options) as pipeline:
        stream = pipeline.stream(options.prompt, images, sampling, system=options.system)
        for piece in stream:
            if not options.json:
                print(shown(piece), end="", flush=True)
        if options.json:
            print(json.dumps(stream.answer.to_dict()), flush=True)
        else:
            print(f"\n\n{report(stream.answer)}", flush=True)
        if options.overlay is not None:
            for path in write_overlays(pipeline.model, stream.images, images, options.overlay):
                print(f"wrote {path}", file=sys.stderr)


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
        f"ran by         {answer.ran.vision}; {answer.ran.language}",
    ]
    return "\n".join(lines)
