"""Who may come in: a bound on the requests and bytes that wait, and an estimate of when there is room."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from hivtp.runtime.serving.protocol.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.runtime.serving.settings import ServerSettings

# How much the newest answer counts in the mean.
NEWEST_SHARE = 0.2
MAX_RETRY_SECONDS = 120.0


class Admission:
    """Counts the requests that the server has. The event loop alone uses it.

    Args:
        settings: how many, and how many bytes.

    Attributes:
        num_inside: requests that are answered, or wait.
        num_waiting_bytes: of requests and images that are not prepared yet.
        is_closed: nobody is let in any more.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.num_inside = 0
        self.num_waiting_bytes = 0
        self.is_closed = False
        self._settings = settings
        self._answer_seconds: float | None = None
        self._closes_at: float | None = None
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def retry_seconds(self) -> float:
        """When a request may find room: after the answers of those before it, as long as answers took lately."""
        num_rounds = -(-max(1, self.num_inside - self._settings.num_slots + 1) // self._settings.num_slots)
        return min(MAX_RETRY_SECONDS, num_rounds * (1.0 if self._answer_seconds is None else self._answer_seconds))

    def check(self) -> None:
        """Refuse a request for which there is no room now.

        Raises:
            ApiError: the server is full (429) or closed (503).
        """
        if self.is_closed:
            left = 1.0 if self._closes_at is None else self._closes_at - asyncio.get_running_loop().time()
            raise ApiError(503, "the server is shutting down; ask again later", "shutting_down", retry_after=left)
        if self.num_inside >= self._settings.num_slots + self._settings.max_queued:
            raise self.busy("too many requests are waiting; ask again later", "queue_full")

    def busy(self, message: str, code: str) -> ApiError:
        """The error of a request that may succeed later."""
        return ApiError(429, message, code, retry_after=self.retry_seconds)

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for a block; see `check` for the errors."""
        self.check()
        self.num_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self._is_empty.set()

    def note_answer(self, seconds: float) -> None:
        """Take note of how long an answer took, from its slot to its end."""
        before = seconds if self._answer_seconds is None else self._answer_seconds
        self._answer_seconds = before + NEWEST_SHARE * (seconds - before)

    async def close(self, seconds: float) -> bool:
        """Let nobody in any more, and wait until all have left; whether they have, in this time."""
        self.is_closed = True
        self._closes_at = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True


class Held:
    """The bytes of one request that wait to be prepared.

    Args:
        admission: counts those of all.
        max_bytes: of all together.
    """

    def __init__(self, admission: Admission, max_bytes: int) -> None:
        self._admission = admission
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Hold some more.

        Raises:
            ApiError: all requests together hold too many.
        """
        if self._admission.num_waiting_bytes + num_bytes > self._max_bytes:
            raise self._admission.busy("the images that are waiting take all the room; ask again later", "queue_full")
        self._admission.num_waiting_bytes += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        """They are prepared, or given up."""
        self._admission.num_waiting_bytes -= self._num_bytes
        self._num_bytes = 0
