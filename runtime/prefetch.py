"""Work on the next item ahead: one thread, one item at a time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from hivtp.runtime.attempt import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from hivtp_ops.errors import HivtpError

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Prefetched(Generic[U]):
    """An item that was taken from where items come from.

    Attributes:
        taken_at: when, as `time.perf_counter` reads.
        result: of the work on it, or the error that it alone failed with.
    """

    taken_at: float
    result: U | HivtpError


class Prefetch(Generic[T, U]):
    """Takes the next item and works on it in a thread, while the present one is used.

    Args:
        work: what is done to an item.
        items: where they come from; it is iterated in the thread.
    """

    def __init__(self, work: Callable[[T], U], items: Iterable[T]) -> None:
        self._work = work
        self._items = iter(items)
        self._thread = ThreadPoolExecutor(1, "hivtp-prefetch")
        self._coming: Future[Prefetched[U] | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown()

    def begin(self) -> Future[Prefetched[U] | None]:
        """Begin to work on the next item, unless that has begun."""
        if self._coming is None:
            self._coming = self._thread.submit(self._take_next)
        return self._coming

    def take(self) -> Prefetched[U] | None:
        """Wait for the next item; None after the last one. It raises what iterating the items raises."""
        coming = self.begin()
        self._coming = None
        return coming.result()

    def _take_next(self) -> Prefetched[U] | None:
        for item in self._items:
            return Prefetched(time.perf_counter(), attempt(self._work, item))
        return None
