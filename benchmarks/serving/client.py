"""A client that notes when what came: one request over a connection of its own, as the bytes arrive."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import h11

PATH = "/v1/chat/completions"
# A client that has not got its whole answer by then goes away without it.
PATIENCE_SECONDS = 60.0


@dataclass
class Exchange:
    """A request and what came of it. Times are in seconds from when it was sent.

    Attributes:
        streams: whether the answer was asked for as a stream.
        num_tokens: that were asked for.
        status: of HTTP; 0 where the connection ended before it.
        code: of an error, "" for none.
        is_whole: the answer came to its end.
        token_s: when each part of a stream came.
        end_s: when the last byte came.
        sent_at: on the clock of the run.
    """

    streams: bool = False
    num_tokens: int = 0
    status: int = 0
    code: str = ""
    is_whole: bool = False
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    sent_at: float = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether the client has its answer."""
        return self.status == 200 and self.is_whole and not self.code

    @property
    def is_refused(self) -> bool:
        """Whether the client was told to come again."""
        return self.status in (429, 503)

    @property
    def ttft_s(self) -> float | None:
        """When the first token came; None where nothing says."""
        return self.token_s[0] if self.token_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between two parts of a stream."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]


async def ask(url: str, content: bytes) -> Exchange:
    """Send a request and read its answer; an error of the connection is noted, too."""
    fields = json.loads(content)
    found = Exchange(streams=fields["stream"], num_tokens=fields["max_tokens"])
    started = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await _exchange(url, content, found, started)
    except (OSError, h11.ProtocolError, EOFError) as error:
        # A TimeoutError is an OSError.
        found.code = type(error).__name__
    found.end_s = time.perf_counter() - started
    return found


async def get(url: str, path: str) -> bytes:
    """The body of a GET.

    Raises:
        OSError: the server cannot be reached, or does not answer with status 200.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise OSError(f"{path} gave {head[:80]!r}")
    return content


async def _exchange(url: str, content: bytes, found: Exchange, started: float) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [("host", address.netloc), ("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(content))))
        request = h11.Request(method="POST", target=PATH, headers=headers)
        writer.write((connection.send(request) or b"") + (connection.send(h11.Data(data=content)) or b""))
        received = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(2**16))
            elif isinstance(event, h11.Response):
                found.status = event.status_code
            elif isinstance(event, h11.Data):
                received += event.data
                if found.streams and found.status == 200:
                    received = _read_events(received, found, time.perf_counter() - started)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                raise EOFError
        if not (found.streams and found.status == 200):
            _read_whole(received, found)
    finally:
        writer.transport.abort()


def _read_events(received: bytes, found: Exchange, now: float) -> bytes:
    """Note the events that have come; what is left of an unfinished one."""
    *events, rest = received.split(b"\n\n")
    for event in events:
        if event == b"data: [DONE]":
            found.is_whole = True
        elif event.startswith(b"data: "):
            _read_chunk(json.loads(event.removeprefix(b"data: ")), found, now)
    return rest


def _read_chunk(chunk: dict[str, Any], found: Exchange, now: float) -> None:
    if "error" in chunk:
        found.code = str(chunk["error"].get("code") or "error")
    elif any(choice["delta"].get("content") for choice in chunk.get("choices", [])):
        found.token_s.append(now)


def _read_whole(received: bytes, found: Exchange) -> None:
    try:
        values = json.loads(received)
    except ValueError:
        found.code = "no_json"
        return
    if "error" in values:
        found.code = str(values["error"].get("code") or "error")
    else:
        found.is_whole = bool(values["choices"][0]["finish_reason"])
