"""One call of the server, below any framework: its headers and body in, an answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from hivtp.runtime.serving.protocol.errors import ApiError, api_error
from hivtp.runtime.serving.protocol.sse import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hivtp.runtime.serving.settings import ServerSettings

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ClientGoneError(Exception):
    """The client has closed its connection: nobody waits for an answer."""


@dataclass
class Call:
    """A request and the way back.

    Attributes:
        scope, receive, send: see ASGI.
        notes: what the log says of it.
    """

    scope: Scope
    receive: Receive
    send: Send
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """The headers, by their names in lower case."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]}

    async def send_json(
        self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        """Answer with an object."""
        await self.send_bytes(to_json(body), status, {"content-type": "application/json", **headers})

    async def send_error(self, error: ApiError) -> None:
        """Answer with an error."""
        self.notes["code"] = error.code
        await self.send_json(error.body, error.status, error.headers)

    async def send_bytes(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        """Answer with some bytes."""
        await self.start(status, {**headers, "content-length": str(len(body))})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin an answer."""
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def send_part(self, part: bytes) -> None:
        """Send a part of an answer that was begun."""
        await self.send({"type": "http.response.body", "body": part, "more_body": True})

    async def finish(self) -> None:
        """End an answer that was begun."""
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def read_json(self, settings: ServerSettings, hold: Callable[[int], None] = lambda _size: None) -> bytes:
        """The body, which says that it is JSON.

        Args:
            settings: how many bytes, and how much time.
            hold: called with the size of each part; what it raises ends the reading.

        Raises:
            ApiError: it is too large (413), comes too slowly (408), or is something else (415).
            ClientGoneError: the client left.
        """
        headers = self.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or "content-encoding" in headers:
            message = "the body must be JSON as it is; set the header Content-Type: application/json"
            raise ApiError(415, message, "unsupported_media_type")
        length = headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > settings.max_body_bytes:
            raise _too_large(settings)
        try:
            async with asyncio.timeout(settings.body_seconds):
                return await self._read(settings, hold)
        except TimeoutError as error:
            message = f"the body did not come within {settings.body_seconds:g} seconds"
            raise ApiError(408, message, "request_timeout") from error

    async def _read(self, settings: ServerSettings, hold: Callable[[int], None]) -> bytes:
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            if len(body) + len(part) > settings.max_body_bytes:
                raise _too_large(settings)
            hold(len(part))
            body += part
            if not message.get("more_body", False):
                return bytes(body)

    async def wait_until_gone(self) -> None:
        """Return when the client leaves; the body was read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _too_large(settings: ServerSettings) -> ApiError:
    message = f"the body has more than {settings.max_body_bytes} bytes; send smaller or fewer images"
    return ApiError(413, message, "body_too_large")


@dataclass(frozen=True)
class Endpoint:
    """What answers the calls of one path.

    Attributes:
        answer: answers; an error that it raises before it begins to is sent as such.
    """

    answer: Callable[[Call], Awaitable[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        call = Call(scope, receive, send, scope.setdefault("hivtp.notes", {}))
        try:
            await self.answer(call)
        except ClientGoneError:
            call.notes["code"] = "client_gone"
        except ApiError as error:
            await call.send_error(api_error(error))
