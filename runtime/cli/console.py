"""What all commands share: how they print, and how they end."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from typing import TYPE_CHECKING

from hivtp.runtime.cli.interrupts import INTERRUPTS
from hivtp.runtime.cli.streams import safe_streams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def run_guarded(program: str, work: Callable[[], int | None], *, is_output_optional: bool = False) -> int:
    """Run a command, and turn whatever ends it into a message and an exit code.

    Args:
        program: its name, for messages.
        work: the command; it returns its exit code, None for 0.
        is_output_optional: what it writes on standard output says what it did, and it does that also where nobody can
            read it.

    Returns:
        0, or 1 after an error, or 2 for wrong usage, or 130 after Ctrl-C, or 141 where the reader of the output left.
    """
    with safe_streams(is_output_optional=is_output_optional) as lenient, INTERRUPTS:
        try:
            try:
                code = work() or 0
            except SystemExit as stop:  # argparse, after --help or wrong usage
                code = stop.code if isinstance(stop.code, int) else 0
            # What is buffered is written here, where a failure is still an error of this command.
            _flush_output()
        except BaseException as error:  # noqa: BLE001 - what is not foreseen is raised again
            code = _explain(program, error)
        if lenient is not None and lenient.error is not None and not isinstance(lenient.error, BrokenPipeError):
            code = _fail(program, f"done, but the output could not be written: {lenient.error.strerror}")
        _give_up_output()
    return code


def run_command(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str],
) -> int:
    """Run a command of the command line; for `run_guarded`.

    Args:
        program: its name, for messages.
        parser: of its command line.
        run: what it does.
        arguments: the command line without the name.
    """
    INTERRUPTS.check()
    # Options may stand between positional arguments, which argparse alone does not take of an optional one.
    options = parser.parse_intermixed_args(arguments)
    if sys.stdout is None:
        return _fail(program, "standard output is closed, so there is nowhere to write the answer; open it")

    def show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
        _print_line(f"{program}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        # What is wrong with an image is said in our words, or is nobody's concern.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        run(options)
    return 0


def shown(text: str) -> str:
    """Text of a model as standard output takes it: on a terminal, its control characters do nothing."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _explain(program: str, error: BaseException) -> int:
    """Say what ended a command; its exit code."""
    if INTERRUPTS.has_come or isinstance(error, KeyboardInterrupt):
        # Once is enough.
        INTERRUPTS.ignore()
        reason = f"; {error}" if isinstance(error, KeyboardInterrupt) and str(error) else ""
        print(file=sys.stderr)
        _print_line(f"{program}: stopped{reason}")
        return 130
    if isinstance(error, BrokenPipeError):
        return 141
    # Its package brings numpy, which a command that fails early need not load.
    from hivtp_ops.errors import HivtpError

    if isinstance(error, HivtpError):
        return _fail(program, str(error))
    if isinstance(error, MemoryError):
        return _fail(program, f"memory ran out{str(error) and f' ({error})'}")
    if isinstance(error, OSError) and error.filename is not None:
        return _fail(program, f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS:
        return _fail(program, f"cannot write the output: {error.strerror}")
    raise error


def _fail(program: str, message: str) -> int:
    _print_line(f"{program}: {message}")
    return 1


def _print_line(message: str) -> None:
    """Print one line to standard error, whatever a file or a name in it holds."""
    letters = (letter if letter.isprintable() else " " for letter in " ".join(message.splitlines()))
    print("".join(letters), file=sys.stderr)


def _flush_output() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _give_up_output() -> None:
    """Drop what cannot be written: Python would fail once more, at exit, on what is buffered."""
    try:
        _flush_output()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
