"""hivtp chat: a conversation in the terminal."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

from hivtp.runtime.cli.options import (
    add_model_options,
    add_sampling_options,
    load_pipeline,
    make_bundle_parser,
    sampling_from,
)
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    import argparse

    from hivtp.runtime.chat import Chat
    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.language.sampling import SamplingParams

DESCRIPTION = """\
Talk with a bundle about images. Each answer streams as it comes, and a further question costs its own tokens only.
"""
EXAMPLES = """\
commands in the conversation:
  /image FILE   give an image with the next question; may be repeated
  /reset        begin a new conversation
  /help         show these
  /quit         leave (also Ctrl-D); Ctrl-C stops an answer

examples:
  hivtp chat bundle --image photo.jpg
  hivtp chat bundle --temperature 0.7
"""
HELP = EXAMPLES.partition("\n\nexamples")[0]


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_bundle_parser(program, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="given with the first question; repeatable"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Read questions until there are no more."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    sampling = sampling_from(options)
    with load_pipeline(options) as pipeline:
        images: list[ImageSource] = list(options.image)
        chat = pipeline.chat(options.system)
        print("Ask about an image: /image FILE, then a question. /help shows all commands.", file=sys.stderr)
        while (line := _read_line()) is not None:
            command, _, argument = line.partition(" ")
            if not line:
                continue
            if command == "/quit":
                break
            if command == "/reset":
                chat, images = pipeline.chat(options.system), []
                print("A new conversation.", file=sys.stderr)
            elif command == "/image":
                images += _checked_image(argument.strip())
            elif command == "/help":
                print(HELP, file=sys.stderr)
            elif command.startswith("/"):
                print(f"There is no command {command}; /help shows those that there are.", file=sys.stderr)
            elif _ask(chat, line, images, sampling):
                images = []


def _read_line() -> str | None:
    """The next line, without the spaces around it; None at the end."""
    try:
        # The prompt goes to stderr, so that what is piped on is the answers alone.
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    if not line:
        print(file=sys.stderr)
        return None
    return line.strip()


def _checked_image(file: str) -> list[ImageSource]:
    """The image, if it can be read; nothing, and why, if not."""
    from hivtp.runtime.inputs.images import load_image

    if not file:
        print("Which image? /image FILE", file=sys.stderr)
        return []
    try:
        image = load_image(file)
    except HivtpError as error:
        print(error, file=sys.stderr)
        return []
    print(f"{file}: {image.width} x {image.height} pixels, for the next question.", file=sys.stderr)
    return [image]


def _ask(chat: Chat, question: str, images: list[ImageSource], sampling: SamplingParams) -> bool:
    """Answer a question; whether it became a turn of the conversation."""
    try:
        stream = chat.stream(question, images, sampling)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            print("\nStopped; the question was not kept.", file=sys.stderr)
            return False
    except HivtpError as error:
        print(error, file=sys.stderr)
        return False
    timings = stream.answer.timings
    decode = "" if timings.decode_ms_per_token is None else f", {timings.decode_ms_per_token:.0f} ms per token"
    print(flush=True)
    print(f"[first token after {timings.ttft_ms:.0f} ms{decode}]", file=sys.stderr)
    return True
