"""A command in a terminal of its own, typed into and read from."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Terminal:
    """Runs a command on a pseudo-terminal.

    Args:
        command: with its arguments.
        folder: where it runs.

    Attributes:
        shown: all that the terminal showed so far.
    """

    def __init__(self, command: Sequence[object], folder: Path) -> None:
        self.shown = ""
        self._read = 0
        arguments = [
            os.fspath(argument) if isinstance(argument, os.PathLike) else str(argument) for argument in command
        ]
        environment = os.environ | {"TERM": "dumb", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": ""}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(arguments[0], arguments, environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)

    def type(self, keys: str) -> None:
        """Press keys; "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._terminal, keys.encode())

    def read_until(self, text: str, seconds: float = 30) -> str:
        """What the terminal shows from where the last call ended up to and with a text."""
        deadline = time.monotonic() + seconds
        while (place := self.shown.find(text, self._read)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come after {self.shown[self._read :]!r}"
            if not self._receive(left):
                raise AssertionError(f"the command ended without {text!r} after {self.shown[self._read :]!r}")
        found = self.shown[self._read : place + len(text)]
        self._read = place + len(text)
        return found

    def wait(self) -> int:
        """Read to the end; the exit code."""
        while self._receive(30):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _receive(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return True
        try:
            content = os.read(self._terminal, 2**16)
        except OSError:
            # Nobody has the terminal open any more.
            return False
        self.shown += content.decode(errors="replace").replace("\r\n", "\n")
        return bool(content)
