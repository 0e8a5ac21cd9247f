"""hivtp chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from hivtp.runtime.cli.console import shown
from hivtp.runtime.cli.interrupts import INTERRUPTS
from hivtp.runtime.cli.options import (
    add_model_options,
    add_sampling_options,
    load_pipeline,
    make_bundle_parser,
    sampling_from,
)
from hivtp_ops.errors import HivtpError, ImageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from PIL import Image

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.language.sampling import SamplingParams
    from hivtp.runtime.pipeline import Pipeline

DESCRIPTION = """\
Talk with a bundle about images. Answers stream, and from the second question on only new tokens are computed.
"""
COMMANDS = """\
commands in the conversation:
  /image FILE   add an image to the next question; may be repeated
  /reset        begin a new conversation
  /help         show these
  /quit         leave (also Ctrl-D); Ctrl-C stops an answer
"""
EXAMPLES = f"""\
{COMMANDS}
examples:
  hivtp chat bundle --image photo.jpg
  hivtp chat bundle --temperature 0.7
"""
PROMPT = "> "


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_bundle_parser(program, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image for the first question; repeatable"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Read questions until there are no more."""
    sampling = sampling_from(options)
    images = [read_image(file) for file in options.image]
    with load_pipeline(options) as pipeline:
        conversation = Conversation(pipeline, options.system, sampling, images)
        say("Ask about an image: /image FILE, then a question. /help shows all commands.")
        while (line := read_line()) is not None and line != "/quit":
            conversation.take(line)


class Conversation:
    """What a user types, and what comes of it.

    Args:
        pipeline: answers.
        system: what the model is told before every conversation.
        sampling: how answers are chosen.
        images: given with the first question.
    """

    def __init__(
        self, pipeline: Pipeline, system: str | None, sampling: SamplingParams, images: list[Image.Image]
    ) -> None:
        self._pipeline = pipeline
        self._system = system
        self._sampling = sampling
        self._chat = pipeline.chat(system)
        self._images = images

    def take(self, line: str) -> None:
        """Do what a line says; what is wrong with it is said, and nothing else happens."""
        command, _, argument = line.partition(" ")
        try:
            if command == "/image":
                self._add_image(argument)
            elif command == "/reset":
                self._begin()
                say("A new conversation.")
            elif command == "/help":
                say(COMMANDS.rstrip())
            elif command.startswith("/") and "/" not in command[1:]:
                say(f"There is no command {command}; /help shows all.")
            elif line:
                self._ask(line)
        except HivtpError as error:
            say(str(error))
        except KeyboardInterrupt:
            # The second one: it may have come at any moment, so nothing of before is sure.
            INTERRUPTS.forget()
            self._begin()
            say("\nStopped; this is a new conversation.")

    def _begin(self) -> None:
        self._chat, self._images = self._pipeline.chat(self._system), []

    def _add_image(self, argument: str) -> None:
        # As a terminal writes a file that is dropped on it, and as people type it.
        file = os.path.expanduser(argument.strip().strip("'\""))
        if not file:
            say("Which image? /image FILE")
            return
        image = read_image(file)
        self._images.append(image)
        say(f"{file}: {image.width} x {image.height} pixels, for the next question.")

    def _ask(self, question: str) -> None:
        with noted_interrupts() as interrupts:
            stream = self._chat.stream(question, self._images, self._sampling)
            for piece in stream:
                print(shown(piece), end="", flush=True)
                if interrupts:
                    stream.close()
                    print(flush=True)
                    say("Stopped; this question and its answer are forgotten.")
                    return
        self._images = []
        print(flush=True)
        say(times(stream.answer))


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Note the first Ctrl-C, so that the model can finish the step at which it is; a second one raises.

    Returns:
        A list that the first one makes longer.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def read_image(file: str) -> Image.Image:
    """An image of a file, or of a named pipe.

    Raises:
        ImageError: it cannot be read; or it is standard input, from which the questions come.
    """
    from hivtp.runtime.cli import files
    from hivtp.runtime.inputs.images import load_image

    if file == "-":
        raise ImageError("standard input gives the questions; give the image as a file")
    return load_image(files.read_image(file))


def read_line() -> str | None:
    """The next line without the spaces around it; None at the end. Ctrl-C gives an empty one."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            _edit_lines()
            return input(PROMPT).strip()
        if sys.stdin.isatty():
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        INTERRUPTS.forget()
        say("")
        return ""
    except EOFError:
        line = ""
    if not line:
        if sys.stdin.isatty():
            say("")
        return None
    return line.strip()


def say(message: str) -> None:
    """Tell the user something that is not the model's: on standard error, so that answers alone can be piped on."""
    print(message, file=sys.stderr, flush=True)


def times(answer: Answer) -> str:
    """How long an answer took."""
    timings = answer.timings
    decode = "" if timings.decode_ms_per_token is None else f", {timings.decode_ms_per_token:.0f} ms per token"
    return f"[first token after {timings.ttft_ms:.0f} ms{decode}]"


def _edit_lines() -> None:
    # Imported, it gives `input` line editing and a history; not every Python has it.
    with contextlib.suppress(ImportError):
        import readline

        # Names of files are completed.
        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")
