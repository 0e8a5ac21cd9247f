"""Which requests are with the server, and what comes back of them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from hivtp.runtime.attempt import attempt
from hivtp.runtime.language.vllm.events import Ended, NewTokens
from hivtp_ops.errors import EngineError, HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivtp.runtime.language.base import DecodeRequest
    from hivtp.runtime.language.remote import RemoteRequest
    from hivtp.runtime.language.vllm.answering import Answering, Emit, Happened

# A step returns after this time at the latest, so that whoever steps can add and cancel.
STEP_SECONDS = 0.01
# Each takes a thread and a connection.
MAX_RUNNING = 256


@dataclass(eq=False)
class _Running:
    """A request that is with the server.

    Attributes:
        request: which.
        num_left: tokens that it may still get.
        last_at: when it was sent, and then when its last token came; as `time.perf_counter` reads.
    """

    request: RemoteRequest
    num_left: int
    last_at: float


class VllmScheduler:
    """See RequestScheduler. The server decides what runs together; what fails fails for one request alone.

    Args:
        context_length: positions of a prompt and its answer.
        num_slots: requests that are with the server at once.
        answer: makes what answers a request.
    """

    def __init__(self, context_length: int, num_slots: int, answer: Callable[[RemoteRequest, Emit], Answering]) -> None:
        self._context_length = context_length
        self._num_slots = min(num_slots, MAX_RUNNING)
        self._answer = answer
        self._waiting: deque[RemoteRequest] = deque()
        self._running: dict[Answering, _Running] = {}
        self._happened: SimpleQueue[Happened] = SimpleQueue()

    @property
    def num_waiting(self) -> int:
        """See RequestScheduler."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """See RequestScheduler."""
        return len(self._running)

    def add(self, request: RemoteRequest) -> None:
        """See RequestScheduler.add."""
        if not 0 < request.num_prompt_tokens < self._context_length:
            raise PromptError(
                f"the prompt takes {request.num_prompt_tokens} positions, and the context of the server holds "
                f"{self._context_length}"
            )
        self._waiting.append(request)

    def cancel(self, request: DecodeRequest) -> None:
        """See RequestScheduler.cancel."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting is not request)
        for answering in [answering for answering in self._running if answering.request is request]:
            self._leave(answering)

    def step(self) -> bool:
        """See RequestScheduler.step: send what may be sent, and hand out what has come, after a short wait for it."""
        while self._waiting and len(self._running) < self._num_slots:
            self._start(self._waiting.popleft())
        if self._running:
            try:
                happened = self._happened.get(timeout=STEP_SECONDS)
                while True:
                    self._hand_out(happened)
                    happened = self._happened.get_nowait()
            except Empty:
                pass
        return bool(self._waiting or self._running)

    def run(self) -> None:
        """See RequestScheduler.run."""
        while self.step():
            pass

    def forget(self) -> None:
        """See RequestScheduler.forget: the server keeps what it keeps."""

    def _start(self, request: RemoteRequest) -> None:
        answering = attempt(self._answer, request, self._happened.put)
        if isinstance(answering, HivtpError):
            attempt(request.fail, answering)
            return
        num_left = min(request.max_new_tokens, self._context_length - request.num_prompt_tokens)
        self._running[answering] = _Running(request, num_left, time.perf_counter())
        attempt(request.begin, 0)
        answering.start()

    def _hand_out(self, happened: Happened) -> None:
        running, event = self._running.get(happened.answering), happened.event
        if running is None:
            # It was given up meanwhile.
            return
        match event:
            case NewTokens():
                milliseconds = (happened.at - running.last_at) * 1e3 / len(event.token_ids)
                running.last_at = happened.at
                goes_on = attempt(self._push, running, event, milliseconds)
                if running.num_left == 0 and goes_on is True:
                    # The server ends by itself.
                    self._running.pop(happened.answering, None)
                elif goes_on is not True:
                    self._leave(happened.answering, goes_on if isinstance(goes_on, HivtpError) else None)
            case Ended():
                reason = f"the server ended the answer early, for the reason {event.reason!r}"
                self._leave(happened.answering, EngineError(reason))
            case HivtpError():
                self._leave(happened.answering, event)

    @staticmethod
    def _push(running: _Running, event: NewTokens, milliseconds: float) -> bool:
        """Hand out tokens; whether the server is right to go on, or to end because there may be no more."""
        request = running.request
        for index, token_id in enumerate(event.token_ids):
            if event.logprobs:
                request.note_logprobs(event.logprobs[index])
            running.num_left -= 1
            goes_on = request.push(token_id, milliseconds)
            if running.num_left == 0:
                return True
            if not goes_on:
                return False
        return True

    def _leave(self, answering: Answering, error: HivtpError | None = None) -> None:
        # `push` may have cancelled the very request.
        if self._running.pop(answering, None) is None:
            return
        answering.give_up()
        if error is not None:
            attempt(answering.request.fail, error)
