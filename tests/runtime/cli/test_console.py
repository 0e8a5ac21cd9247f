"""How a command ends, whatever ends it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.cli.console import run_command, run_guarded, shown
from hivtp_ops.errors import BundleError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def interrupted_import() -> int:
    """As numpy ends when it is interrupted while it is imported."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ImportError('PyCapsule_Import could not import module "datetime"')


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(BundleError("it is damaged;\nexport it again")), 1, "hivtp x: it is damaged; export it again\n"),
        (raising(OutOfMemoryError("too large")), 1, "hivtp x: too large\n"),
        (raising(MemoryError()), 1, "hivtp x: memory ran out\n"),
        (raising(MemoryError("Unable to allocate 9 TiB")), 1, "hivtp x: memory ran out (Unable to allocate 9 TiB)\n"),
        (raising(PermissionError(13, "Permission denied", "a/b")), 1, "hivtp x: a/b: Permission denied\n"),
        (raising(OSError(28, "No space left")), 1, "hivtp x: cannot write the output: No space left\n"),
        (raising(BrokenPipeError(32, "Broken pipe")), 141, ""),
        (raising(KeyboardInterrupt()), 130, "\nhivtp x: stopped\n"),
        (raising(KeyboardInterrupt("nothing was written")), 130, "\nhivtp x: stopped; nothing was written\n"),
        (interrupted_import, 130, "\nhivtp x: stopped\n"),
        (raising(SystemExit(2)), 2, ""),
        (raising(SystemExit(None)), 0, ""),
        (raising(BundleError("a\x1b[31mb\x07\u202e")), 1, "hivtp x: a [31mb  \n"),
    ],
)
def test_every_end_has_its_code_and_its_message(capsys, work, code, message):
    handler = signal.getsignal(signal.SIGINT)
    assert run_guarded("hivtp x", work) == code
    assert capsys.readouterr() == ("", message)
    assert signal.getsignal(signal.SIGINT) == handler


def test_what_nobody_foresaw_is_raised():
    """With its traceback, which tells where the bug is."""
    with pytest.raises(ZeroDivisionError):
        run_guarded("hivtp x", lambda: 1 // 0)
    with pytest.raises(OSError, match="Not a typewriter"):
        run_guarded("hivtp x", raising(OSError(25, "Not a typewriter")))


def test_warnings_are_lines_of_the_command(capsys):
    def run(_options: Any) -> None:
        warnings.warn("this is slow", UserWarning, stacklevel=1)

    assert run_command("hivtp x", argparse.ArgumentParser(), run, []) == 0
    assert capsys.readouterr().err == "hivtp x: this is slow\n"


def test_control_characters_of_a_model_do_nothing_on_a_terminal(monkeypatch):
    answer = "a\x1b]0;title\x07b\r\u202ec\td\ne é 猫 🙂"
    assert shown(answer) == answer
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert shown(answer) == "a�]0;title�b��c\td\ne é 猫 🙂"


def test_a_signal_that_comes_while_the_end_is_told_changes_nothing(capsys, monkeypatch):
    def work() -> int:
        raise KeyboardInterrupt

    write = sys.stderr.write

    def interrupted_write(text: str) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return write(text)

    monkeypatch.setattr(sys.stderr, "write", interrupted_write)
    assert run_guarded("hivtp x", work) == 130
    assert capsys.readouterr().err == "\nhivtp x: stopped\n"


def test_an_interrupt_that_was_swallowed_is_raised_where_the_command_begins(capsys):
    def work() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return run_command("hivtp x", argparse.ArgumentParser(), lambda _options: None, [])

    assert run_guarded("hivtp x", work) == 130
    assert run_guarded("hivtp x", lambda: 0) == 0
    assert capsys.readouterr().err == "\nhivtp x: stopped\n"


def test_a_job_in_the_background_ignores_interrupts():
    def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 5

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_guarded("hivtp x", work) == 5
    finally:
        signal.signal(signal.SIGINT, before)
