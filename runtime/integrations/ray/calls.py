"""A call of HTTP on its way from a gateway to a replica, and its answer on the way back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, MutableMapping

    from hivtp.runtime.serving.http.asgi import App

# How long an app may take to end after its client went, until its task is cancelled.
END_SECONDS = 5.0


@dataclass(frozen=True)
class HttpCall:
    """A call.

    Attributes:
        method, path, query: of the request line.
        headers: names in lower case.
        body: the whole of it.
        client: address and port, where they are known.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: tuple[str, int] | None = None

    @property
    def scope(self) -> dict[str, Any]:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


@dataclass(frozen=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    @property
    def is_stream(self) -> bool:
        """Whether it is one of events, in which an error can still be told."""
        return any(name == b"content-type" and b"text/event-stream" in value for name, value in self.headers)


AnswerPart: TypeAlias = "Head | bytes"


async def answer_call(app: App, call: HttpCall) -> AsyncGenerator[AnswerPart]:
    """Give a call to an app, and give out its answer as it comes: the head, then parts of the body.

    Closing the iterator tells the app that its client has gone.
    """
    parts: asyncio.Queue[AnswerPart | None] = asyncio.Queue()
    has_gone = asyncio.Event()
    has_body = False

    async def receive() -> dict[str, Any]:
        nonlocal has_body
        if not has_body:
            has_body = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await has_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            parts.put_nowait(Head(message["status"], tuple((bytes(n), bytes(v)) for n, v in message["headers"])))
        elif message.get("body"):
            parts.put_nowait(bytes(message["body"]))

    task = asyncio.ensure_future(app(call.scope, receive, send))
    task.add_done_callback(lambda _: parts.put_nowait(None))
    try:
        while (part := await parts.get()) is not None:
            yield part
        await task
    finally:
        has_gone.set()
        if not task.done():
            await asyncio.wait([task], timeout=END_SECONDS)
            task.cancel()
