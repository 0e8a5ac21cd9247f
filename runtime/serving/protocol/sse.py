"""Server-sent events, byte by byte."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would otherwise hold a stream back until it has collected some kilobytes.
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
# A comment, which clients skip; a proxy sees that the stream lives.
KEEP_ALIVE = b": keep-alive\n\n"


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON without blanks, on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + to_json(value) + b"\n\n"
