"""Spans of OpenTelemetry, where its package is installed and something has set it up; otherwise nothing.

`opentelemetry-instrument hivtp serve ...` sets it up, for one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hivtp.runtime.serving.flow.exchange import Exchange

# Fields of the log that a span has, too.
ATTRIBUTES = {
    "status": "http.response.status_code",
    "code": "error.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "new_tokens": "gen_ai.usage.output_tokens",
    "image_tokens": "hivtp.image_tokens",
    "kept_tokens": "hivtp.kept_tokens",
    "cached_tokens": "hivtp.cached_tokens",
    "queue_ms": "hivtp.queue_ms",
    "vision_ms": "hivtp.vision_ms",
}


class Tracing:
    """Writes a span for each answer, with one for each of its stages below it."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate, trace
        except ImportError:
            self._tracer: Any = None
            return
        self._tracer = trace.get_tracer("hivtp")
        self._extract = propagate.extract
        self._as_parent = trace.set_span_in_context

    def record(self, exchange: Exchange, headers: Mapping[str, str], model: str, notes: Mapping[str, Any]) -> None:
        """Write the spans of a request that has ended.

        Args:
            exchange: the request.
            headers: of the call; they may name the span that it belongs to.
            model: what the server calls the model.
            notes: what the log says of the request.
        """
        if self._tracer is None:
            return
        # From the clock that measures to the one that spans have.
        offset = time.time_ns() - int(time.perf_counter() * 1e9)
        attributes = {ATTRIBUTES[name]: value for name, value in notes.items() if name in ATTRIBUTES}
        attributes |= {"gen_ai.operation.name": "chat", "gen_ai.request.model": model}
        span = self._tracer.start_span(
            "chat",
            context=self._extract(headers),
            start_time=offset + int(exchange.arrived_at * 1e9),
            attributes=attributes,
        )
        parent = self._as_parent(span)
        for name, start, stop in _stages(exchange):
            part = self._tracer.start_span(name, context=parent, start_time=offset + int(start * 1e9))
            part.end(offset + int(stop * 1e9))
        span.end(offset + int(time.perf_counter() * 1e9))


def _stages(exchange: Exchange) -> Iterator[tuple[str, float, float]]:
    """The stages that a request came through: name, start and end."""
    job = exchange.job
    if job is None or job.begun_at is None:
        return
    yield "prepare", exchange.arrived_at, job.begun_at
    if job.first_token_at is None:
        return
    yield "prefill", job.begun_at, job.first_token_at
    if job.ended_at is not None:
        yield "decode", job.first_token_at, job.ended_at
