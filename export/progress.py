"""Progress of an export on the terminal: one line per step, with its time."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where lines cannot be overwritten, as in a log.
SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Prints numbered steps to stderr, and how far the running one is: live on a terminal, else now and then.

    Args:
        num_steps: how many steps there will be.
        is_quiet: print nothing.
    """

    def __init__(self, num_steps: int, is_quiet: bool = False) -> None:
        self._num_steps = num_steps
        self._step = 0
        self._started = 0.0
        self._shown = 0.0
        self._title = ""
        self._is_quiet = is_quiet
        self._is_live = not is_quiet and sys.stderr.isatty()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and print its time when it ends."""
        self._step += 1
        self._started = self._shown = time.perf_counter()
        self._title = f"[{self._step}/{self._num_steps}] {title}"
        self._show(f"{self._title} ...", end="" if self._is_live else "\n")
        yield
        self._show(f"{self._title}: done in {time.perf_counter() - self._started:.1f} s", end="\n")

    def update(self, num_done: int, num_all: int) -> None:
        """Show how much of the running step is done, and how long the rest takes at this pace."""
        now = time.perf_counter()
        if not self._is_live and now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        left = (now - self._started) / max(1, num_done) * (num_all - num_done)
        text = f"{self._title}: {num_done} of {num_all}, about {left:.0f} s left"
        self._show(text, end="" if self._is_live else "\n")

    def _show(self, text: str, end: str) -> None:
        if not self._is_quiet:
            start = "\r\x1b[K" if self._is_live else ""
            print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
