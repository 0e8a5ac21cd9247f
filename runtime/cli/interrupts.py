"""Ctrl-C, noted: a library that it meets while it is imported may swallow it, or raise something else."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Interrupts:
    """Raises KeyboardInterrupt at Ctrl-C, as Python does, and notes that it came.

    It does so within a `with` block, and only where Python would: a job in the background ignores Ctrl-C.

    Attributes:
        has_come: Ctrl-C came, and nobody called `forget` since.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._before: Callable[[int, Any], Any] | int | None = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> Self:
        self.has_come = False
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:
            self._handle(self._note)
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._pass_over
        return self

    def __exit__(self, *_error: object) -> None:
        sys.unraisablehook = self._hook
        self._handle(self._before)

    def check(self) -> None:
        """Raise what was swallowed.

        Raises:
            KeyboardInterrupt: Ctrl-C came.
        """
        if self.has_come:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Take note that Ctrl-C did what it was for."""
        self.has_come = False

    def ignore(self) -> None:
        """Let further ones do nothing, until the block ends."""
        self._handle(signal.SIG_IGN)

    def _note(self, _number: int, _frame: object) -> None:
        self.has_come = True
        raise KeyboardInterrupt

    def _pass_over(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Say nothing of one that came while Python could not raise it; it is noted."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._hook(unraisable)

    def _handle(self, handler: Callable[[int, Any], Any] | int | None) -> None:
        # In another thread than the main one nothing can be handled.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handler)


# Of the command that runs in this process.
INTERRUPTS = Interrupts()
