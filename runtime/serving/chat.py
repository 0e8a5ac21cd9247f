"""POST /v1/chat/completions: one answer, whole or as a stream, until it ends or its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.extension import counts, extension, has_images, kept
from hivtp.runtime.serving.flow.job import Finished, NewToken
from hivtp.runtime.serving.http.asgi import ClientGoneError
from hivtp.runtime.serving.protocol.errors import ApiError, api_error
from hivtp.runtime.serving.protocol.reply import Reply
from hivtp.runtime.serving.protocol.sse import DONE, HEADERS, KEEP_ALIVE, event, to_json
from hivtp.runtime.serving.telemetry.logs import log, where
from hivtp.runtime.serving.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.flow.exchange import Exchange
    from hivtp.runtime.serving.flow.job import Event
    from hivtp.runtime.serving.flow.service import Service
    from hivtp.runtime.serving.flow.stages import Work
    from hivtp.runtime.serving.http.asgi import Call

# A client that does not read what it is sent gets this long for an error before its connection is closed.
LAST_WORDS_SECONDS = 5.0
MAX_NAMED_FIELDS = 20


class ChatEndpoint:
    """Answers chats.

    Args:
        service: what answers them.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tracing = Tracing()

    async def answer(self, call: Call) -> None:
        """See Endpoint.answer."""
        service = self._service
        exchange = service.exchange()
        try:
            # Before the body is read: who is refused anyway need not send it.
            service.admission.check()
            body = await call.read_json(service.settings, exchange.held.add)
            with service.admission.enter():
                work = await service.read(exchange, body)
                # Many megabytes, which must not wait with the request.
                del body
                await self._answer(call, exchange, work)
        except Exception as error:
            found = self._noted(call, error)
            if found is None:
                raise
            raise found from error
        finally:
            exchange.held.release()
            _note(call, exchange)
            self._tracing.record(exchange, call.headers, service.names[0], call.notes)

    async def _answer(self, call: Call, exchange: Exchange, work: Work) -> None:
        chat = work.chat
        call.notes.update(streams=chat.streams, images=len(work.references))
        if chat.ignored:
            call.notes["ignored"] = _names(chat.ignored)
        reply = Reply(chat, exchange.id, self._service.names[0], exchange.created, self._service.logprobs)
        gone = asyncio.ensure_future(call.wait_until_gone())
        events = self._service.answer(exchange, call.scope.get("hivtp.key", ""))
        try:
            watched = _watched(events, gone, self._service)
            async with contextlib.aclosing(watched):
                if chat.streams:
                    await self._stream(call, exchange, reply, watched)
                else:
                    await self._send_whole(call, exchange, reply, watched)
        finally:
            gone.cancel()

    async def _send_whole(
        self, call: Call, exchange: Exchange, reply: Reply, events: AsyncIterator[Event | None]
    ) -> None:
        async for item in events:
            if isinstance(item, Finished):
                call.notes["finish"] = item.answer.finish_reason
                # Log probabilities of a long answer are megabytes, and there may be many tiles to tell of.
                body = await self._service.stages.in_text_thread(
                    _whole, reply, item.answer, exchange, self._service.model
                )
                await call.send_bytes(body, 200, {"content-type": "application/json", **_headers(exchange)})

    async def _stream(self, call: Call, exchange: Exchange, reply: Reply, events: AsyncIterator[Event | None]) -> None:
        has_started = has_token = False
        try:
            async with asyncio.timeout_at(exchange.deadline):
                async for item in events:
                    if not has_started:
                        # Only now, so that what is refused before the first token has the status of an error.
                        await call.start(200, {**HEADERS, **_headers(exchange)})
                        has_started = True
                    if item is not None and not has_token:
                        await call.send_part(reply.first_chunk(exchange.usage))
                        has_token = True
                        if has_images(exchange):
                            await call.send_part(await self._kept(exchange, reply))
                    if part := self._part(call, exchange, reply, item):
                        await call.send_part(part)
        except Exception as error:
            if not has_started:
                raise
            # The status is sent; clients take an error from the stream, and an end without one for success.
            found = self._noted(call, error)
            if found is not None:
                await _last_words(call, event(found.body) + DONE)
        else:
            await call.send_part(DONE)
            await call.finish()

    def _part(self, call: Call, exchange: Exchange, reply: Reply, item: Event | None) -> bytes:
        """What is sent for an event."""
        match item:
            case None:
                return KEEP_ALIVE
            case NewToken(text, logprobs) if text or logprobs:
                return reply.text_chunk(text, logprobs, exchange.usage)
            case Finished(answer, text):
                call.notes["finish"] = answer.finish_reason
                rest = reply.text_chunk(text, (), exchange.usage) if text else b""
                told = counts(exchange, answer) if _is_told(exchange) else None
                return rest + reply.last_chunks(answer, exchange.usage, told)
        return b""

    async def _kept(self, exchange: Exchange, reply: Reply) -> bytes:
        """Where pruning kept what; with many tiles it takes a while to tell."""
        told = await self._service.stages.in_text_thread(kept, self._service.model, exchange)
        return reply.extension_chunk(exchange.usage, told)

    def _noted(self, call: Call, error: Exception) -> ApiError | None:
        """The error as its client is told, counted and logged; None where nobody is there to be told."""
        if isinstance(error, ClientGoneError):
            call.notes["code"] = "client_gone"
            self._service.metrics.failed("client_gone", is_rejected=False)
            return None
        if isinstance(error, TimeoutError):
            error = ApiError(504, "the answer was not read in time", "request_timeout")
        found = api_error(error)
        if found.status == 500:
            log(logging.ERROR, "request_failed", id=call.notes.get("id"), error=where(error))
        self._service.metrics.failed(found.code, is_rejected=found.status == 429)
        call.notes["code"] = found.code
        return found


async def _watched(
    events: AsyncGenerator[Event], gone: asyncio.Future[Any], service: Service
) -> AsyncGenerator[Event | None]:
    """The events, and None where none came for long.

    Raises:
        ApiError: the server gives its requests up.
        ClientGoneError: nobody reads any more.
    """
    pending: asyncio.Future[Event] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events))
            waiting = {pending, gone, service.given_up}
            await asyncio.wait(waiting, timeout=service.settings.keep_alive_seconds, return_when="FIRST_COMPLETED")
            if gone.done():
                raise ClientGoneError
            if pending.done():
                done, pending = pending, None
                item = done.result()
                yield item
                if isinstance(item, Finished):
                    return
            elif service.given_up.done():
                raise ApiError(503, "the server is shutting down; ask again later", "shutting_down", retry_after=1)
            else:
                yield None
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending
        await events.aclose()


async def _last_words(call: Call, part: bytes) -> None:
    """Send an error and end; a client that does not take it is left alone."""
    try:
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await call.send_part(part)
            await call.finish()
    except TimeoutError as error:
        raise ClientGoneError from error


def _whole(reply: Reply, answer: Answer, exchange: Exchange, model: Model) -> bytes:
    told = extension(model, exchange, answer) if _is_told(exchange) else None
    return to_json(reply.body(answer, exchange.usage, told))


def _is_told(exchange: Exchange) -> bool:
    """Whether the answer has what is beyond OpenAI's fields."""
    return exchange.work is not None and exchange.work.chat.includes is not None


def _headers(exchange: Exchange) -> dict[str, str]:
    """What the server ignored: names that a client sent go into a header only as far as they are words."""
    assert exchange.work is not None, "an answer comes of what was read"
    names = _names(exchange.work.chat.ignored)
    return {"hivtp-ignored": ", ".join(names)} if names else {}


def _names(fields: tuple[str, ...]) -> list[str]:
    return [name for name in fields if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)][:MAX_NAMED_FIELDS]


def _note(call: Call, exchange: Exchange) -> None:
    """What the log says of a request: counts and times, no words."""
    call.notes["queue_ms"] = round(exchange.waited_seconds * 1e3, 1)
    job = exchange.job
    if job is None:
        return
    usage, prompt = exchange.usage, job.prompt
    call.notes.update(
        prompt_tokens=usage.num_prompt_tokens,
        cached_tokens=usage.num_cached_tokens,
        image_tokens=usage.num_image_tokens,
        kept_tokens=usage.num_kept_tokens,
        new_tokens=usage.num_new_tokens,
        preprocess_ms=round(prompt.preprocess_ms, 1),
        vision_ms=round(prompt.vision_ms, 1),
    )
    if job.begun_at is not None and job.first_token_at is not None:
        call.notes["prefill_ms"] = round((job.first_token_at - job.begun_at) * 1e3, 1)
        call.notes["ttft_ms"] = round((job.first_token_at - exchange.arrived_at) * 1e3, 1)
    if job.ended_at is not None and job.first_token_at is not None:
        call.notes["decode_ms"] = round((job.ended_at - job.first_token_at) * 1e3, 1)
