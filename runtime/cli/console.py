"""What all commands share: how they start, what they print, and how they end."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from typing import TYPE_CHECKING

from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


def run_command(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str],
) -> int:
    """Run a command.

    Args:
        program: its name, for messages.
        parser: of its command line.
        run: what it does.
        arguments: the command line without the name.

    Returns:
        The exit code: 0, or 1 after an error, or 130 after Ctrl-C, or 141 where the reader of the output has left.
        argparse exits with 2 for wrong usage.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model may write any character, and a terminal need not know them all.
            stream.reconfigure(errors="replace")
    # Options may stand between positional arguments, which argparse alone does not take of an optional one.
    options = parser.parse_intermixed_args(arguments)

    def show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
        print(f"{program}: {_as_line(str(message))}", file=sys.stderr)

    try:
        if sys.stdout is None:
            return _fail(program, "standard output is closed, so there is nowhere to write the answer; open it")
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            run(options)
        # What is buffered is written here, where a failure is still an error of this command.
        sys.stdout.flush()
    except HivtpError as error:
        return _fail(program, str(error))
    except KeyboardInterrupt as stopped:
        print(f"\n{program}: stopped{f'; {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            raise
        _drop_output()
        return _fail(program, f"cannot write the output: {error.strerror}")
    return 0


def _fail(program: str, message: str) -> int:
    print(f"{program}: {_as_line(message)}", file=sys.stderr)
    return 1


def _as_line(message: str) -> str:
    """A message as one line that a terminal only shows: a stranger's file or name may be quoted in it."""
    return " ".join("".join(character if character.isprintable() else " " for character in message).split())


def _drop_output() -> None:
    """Give up standard output: Python would fail once more, at exit, on what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
