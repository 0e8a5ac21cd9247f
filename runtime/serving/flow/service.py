"""The path of one request through the server: admission, images, vision stage, slot, tokens."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.flow.admission import Admission, Held
from hivtp.runtime.serving.flow.counters import count_answer, make_metrics
from hivtp.runtime.serving.flow.engine import Engine
from hivtp.runtime.serving.flow.exchange import Exchange
from hivtp.runtime.serving.flow.job import Begun, Failed, Finished, Job, NewToken
from hivtp.runtime.serving.flow.stages import Stages
from hivtp.runtime.serving.flow.warm_up import warm_up_model
from hivtp.runtime.serving.protocol.chat_request import check_model
from hivtp.runtime.serving.protocol.errors import ApiError, invalid
from hivtp.runtime.serving.protocol.logprobs import LogprobsWriter
from hivtp.runtime.serving.telemetry.logs import log, where

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Sequence

    from hivtp.runtime.model import EncodedPrompt, Model
    from hivtp.runtime.serving.flow.job import Event
    from hivtp.runtime.serving.flow.stages import Work
    from hivtp.runtime.serving.settings import ServerSettings


# Between two looks at how late the event loop is.
LAG_SECONDS = 0.1


class Service:
    """Answers requests. The event loop alone uses it; `start` comes first.

    Args:
        model: answers.
        settings: bounds.

    Raises:
        MissingExtraError: a package of the extra `serve` is not installed.
        OutOfMemoryError: there is no memory for the slots.
        SettingsError: not even a short request would fit.
    """

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        name = model.bundle.manifest.source.name
        self.names: Sequence[str] = settings.model_names or (name, "hivtp")
        self.engine = Engine(model, settings, self._deliver)
        self.max_tokens = min(settings.max_tokens or self.engine.max_positions, self.engine.max_positions)
        self.admission = Admission(settings)
        self.stages = Stages(model, settings)
        self.logprobs = LogprobsWriter(model.tokenizer)
        self.metrics = make_metrics(self.names[0], self.engine, self.admission, model.images.cache)
        self._prepared = asyncio.Semaphore(settings.max_prepared)
        self._events: dict[Job, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._given_up: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_warm = self._has_failed = False

    async def start(self) -> None:
        """Begin to work, in the running event loop; it is ready a little later."""
        self._loop = asyncio.get_running_loop()
        self._given_up = self._loop.create_future()
        self.engine.start()
        self._tasks = [self._loop.create_task(self._warm_up()), self._loop.create_task(self._watch_loop())]

    async def stop(self) -> None:
        """Give up what is left, and end the threads."""
        self.give_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.stages.close)

    @property
    def given_up(self) -> asyncio.Future[None]:
        """Done when the requests that are still answered must get an error."""
        assert self._given_up is not None, "the service was started"
        return self._given_up

    def give_up(self) -> None:
        """End all requests with an error."""
        self.admission.is_closed = True
        if not self.given_up.done():
            self.given_up.set_result(None)

    @property
    def state(self) -> str:
        """How it is: "ready", "loading", "draining" or "failed"."""
        if self.admission.is_closed:
            return "draining"
        if self.engine.is_dead or self._has_failed:
            return "failed"
        return "ready" if self._is_warm and self.engine.is_ready else "loading"

    def exchange(self) -> Exchange:
        """A request that has just come."""
        held = Held(self.admission, self.settings.max_waiting_bytes)
        return Exchange(held, asyncio.get_running_loop().time() + self.settings.request_seconds)

    async def read(self, exchange: Exchange, body: bytes) -> Work:
        """Check a request.

        Raises:
            ApiError: it is wrong.
        """
        exchange.work = work = await self.stages.parse(body)
        exchange.held.release()
        exchange.held.add(sum(map(len, work.contents.values())))
        check_model(work.chat.model, self.names)
        return work

    async def answer(self, exchange: Exchange, salt: str) -> AsyncGenerator[Event]:
        """Answer a request that was read; the events end with Finished.

        Closing the iterator gives the request up, wherever it is.

        Args:
            exchange: the request.
            salt: whose it is; the KV cache of one never serves another.

        Raises:
            ApiError: the request cannot be answered, now or at all.
            HivtpError: what it failed with.
        """
        assert exchange.work is not None, "a request is read before it is answered"
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(exchange.held.release)
            stack.callback(setattr, exchange.work, "is_given_up", True)
            place = stack.enter_context(contextlib.ExitStack())
            prompt = await self._within(exchange, self._prepare(exchange, place))
            exchange.job = job = await self.stages.in_text_thread(self._job, prompt, salt)
            events: asyncio.Queue[Event] = asyncio.Queue()
            self._events[job] = events
            stack.callback(self._leave, job)
            self.engine.submit(job)
            await self._wait_for_slot(exchange, events)
            place.close()
            last_token_at: float | None = None
            while True:
                event = await self._within(exchange, events.get())
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, NewToken):
                    if last_token_at is not None:
                        self.metrics.inter_token.observe(event.at - last_token_at)
                    last_token_at = event.at
                if isinstance(event, Finished):
                    assert job.begun_at is not None, "an answer has begun"
                    assert job.ended_at is not None, "an answer has ended"
                    self.admission.note_answer(job.ended_at - job.begun_at)
                    count_answer(self.metrics, exchange, event.answer.finish_reason)
                yield event
                if isinstance(event, Finished):
                    return

    async def _prepare(self, exchange: Exchange, place: contextlib.ExitStack) -> EncodedPrompt:
        """Get a request ready for the decoder; one with images takes a place until it has a slot."""
        work = exchange.work
        assert work is not None, "a request is read before it is answered"
        if work.chat.has_images:
            await self.stages.fetch(work, exchange.held.add)
            await self._wait(exchange, self._prepared.acquire())
            place.callback(self._prepared.release)
            await self.stages.prepare(work)
            exchange.held.release()
        prompt = await self.stages.encode(work, self.max_tokens)
        length = len(prompt.token_ids) + sum(len(image.embeds) - 1 for image in prompt.images)
        if length >= self.engine.max_positions:
            raise invalid(
                f"the prompt takes {length} tokens, images included, and this server has room for "
                f"{self.engine.max_positions} together with the answer; shorten it, or leave images out",
                "messages",
                "context_length_exceeded",
            )
        return prompt

    def _job(self, prompt: EncodedPrompt, salt: str) -> Job:
        # The key of a client stays out of what a debugger or a core dump shows.
        digest = hashlib.sha256(salt.encode()).digest()
        return Job(self.model, prompt, digest, self.engine.max_positions, self.engine.emit)

    async def _wait_for_slot(self, exchange: Exchange, events: asyncio.Queue[Event]) -> None:
        event = await self._wait(exchange, self._within(exchange, events.get()))
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Begun), "a job begins before it goes on"

    async def _wait(self, exchange: Exchange, waiting: Awaitable[Any]) -> Any:
        """Wait for others, as long as a request may."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, self.settings.queue_seconds - exchange.waited_seconds)):
                return await waiting
        except TimeoutError as error:
            message = f"there was no room within {self.settings.queue_seconds:g} seconds; ask again later"
            raise self.admission.busy(message, "queue_timeout") from error
        finally:
            exchange.waited_seconds += time.perf_counter() - started

    async def _within(self, exchange: Exchange, work: Awaitable[Any]) -> Any:
        """Do something before the request's time is over."""
        try:
            async with asyncio.timeout_at(exchange.deadline):
                return await work
        except TimeoutError as error:
            seconds = self.settings.request_seconds
            message = f"the answer took more than {seconds:g} seconds; ask for fewer tokens"
            raise ApiError(504, message, "request_timeout") from error

    async def _warm_up(self) -> None:
        """Do once what the first request would wait for. Whoever cannot even do this is not ready, ever."""
        try:
            await self.stages.in_vision_thread(warm_up_model, self.model)
            self._is_warm = True
        except Exception as error:  # noqa: BLE001  whatever a model raises
            self._has_failed = True
            log(logging.CRITICAL, "warm_up_failed", error=where(error))

    async def _watch_loop(self) -> None:
        """Measure how late the event loop is: by that much everything is that clients wait for."""
        while True:
            started = time.perf_counter()
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.loop_lag.observe(max(0.0, time.perf_counter() - started - LAG_SECONDS))

    def _leave(self, job: Job) -> None:
        del self._events[job]
        if job.ended_at is None:
            self.engine.cancel(job)

    def _deliver(self, happened: Sequence[tuple[Job, Event]]) -> None:
        """Hand events to the requests that wait for them; called in the engine's thread."""
        # The loop of a server that has stopped takes nothing more.
        with contextlib.suppress(RuntimeError):
            assert self._loop is not None, "the engine works after the service was started"
            self._loop.call_soon_threadsafe(self._put, happened)

    def _put(self, happened: Sequence[tuple[Job, Event]]) -> None:
        for job, event in happened:
            if job in self._events:
                self._events[job].put_nowait(event)
