"""Progress of long work: a bar for each step on a terminal, now and then a line in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Between lines in a log.
SECONDS_BETWEEN_LINES = 20.0
# What tqdm writes: while the length is not known, and once it is.
_BEGUN = "{desc} ..."
_COUNTED = "{desc}: {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}, {remaining} left"


class Progress:
    """Shows numbered steps on stderr, how far the running one is, and how long each took.

    Args:
        num_steps: how many steps there will be.
        is_quiet: print nothing.
    """

    def __init__(self, num_steps: int, is_quiet: bool = False) -> None:
        self._num_steps = num_steps
        self._step = 0
        self._is_quiet = is_quiet or sys.stderr is None
        self._is_terminal = not self._is_quiet and sys.stderr.isatty()
        self._title = ""
        self._bar: Any = None
        self._started = self._shown = 0.0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and print its time when it ends."""
        self._step += 1
        self._title = f"[{self._step}/{self._num_steps}] {title}"
        self._started = self._shown = time.perf_counter()
        with self._open_bar():
            yield
        self._print(f"{self._title}: done in {time.perf_counter() - self._started:.1f} s")

    def update(self, num_done: int, num_all: int) -> None:
        """Show how much of the running step is done, and how long the rest takes at this pace."""
        if self._bar is not None:
            self._bar.bar_format = _COUNTED
            self._bar.total = num_all
            self._bar.update(num_done - self._bar.n)
            return
        now = time.perf_counter()
        if now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            left = (now - self._started) / max(1, num_done) * (num_all - num_done)
            self._print(f"{self._title}: {num_done} of {num_all}, about {left:.0f} s left")

    @contextlib.contextmanager
    def _open_bar(self) -> Iterator[None]:
        if not self._is_terminal:
            self._print(f"{self._title} ...")
            yield
            return
        from tqdm import tqdm

        with tqdm(desc=self._title, bar_format=_BEGUN, leave=False, dynamic_ncols=True, file=sys.stderr) as self._bar:
            yield
        self._bar = None

    def _print(self, text: str) -> None:
        if not self._is_quiet:
            # The work goes on where nobody reads of it.
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)
