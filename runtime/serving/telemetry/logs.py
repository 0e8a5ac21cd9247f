"""The server's log: one line for each event, written by a thread of its own, so that no slow disk holds up an answer.

Prompts, answers and images never stand in it, nor do messages of errors, which may quote them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import traceback
from datetime import UTC, datetime
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger("hivtp.serving")
MAX_WAITING_LINES = 10_000
# At the end, for what still waits.
LAST_LINES_SECONDS = 2.0


def log(level: int, event: str, **fields: Any) -> None:
    """Write an event with its fields."""
    logger.log(level, event, extra={"fields": fields})


def where(error: BaseException) -> list[str]:
    """The kinds of an error and of its causes, each with the place in the code that raised it; not their words."""
    places: list[str] = []
    found: BaseException | None = error
    while found is not None and len(places) < 8:
        frames = traceback.extract_tb(found.__traceback__)[-6:]
        steps = " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)
        places.append(f"{type(found).__name__} at {steps or 'an unknown place'}")
        found = found.__cause__ or found.__context__
    return places


class LineFormatter(logging.Formatter):
    """One line of JSON, or of text for people.

    Args:
        is_json: which.
    """

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter.format."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            fields = {**fields, "error": where(record.exc_info[1])}
        if self._is_json:
            line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage(), **fields}
            return json.dumps(line, default=str)
        words = [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        return " ".join([time, record.levelname, json.dumps(record.getMessage())[1:-1], *words])


class _Lines(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes; where that cannot follow they are lost, and no request waits."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class _Writer(logging.StreamHandler[Any]):
    """A full disk costs lines, and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        pass


@contextlib.contextmanager
def logging_to(stream: Any, log_format: str) -> Iterator[None]:
    """Write the log of the server, and of uvicorn below it, to a stream."""
    waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING_LINES)
    writer = _Writer(stream)
    writer.setFormatter(LineFormatter(is_json=log_format == "json"))
    thread = Thread(target=_write, args=(waiting, writer), name="hivtp-log", daemon=True)
    thread.start()
    handler = _Lines(waiting)
    loggers = [(logger, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)]
    before = [(one, one.level, one.propagate) for one, _ in loggers]
    for one, level in loggers:
        one.addHandler(handler)
        one.setLevel(level)
        one.propagate = False
    try:
        yield
    finally:
        for one, level, propagates in before:
            one.removeHandler(handler)
            one.setLevel(level)
            one.propagate = propagates
        with contextlib.suppress(queue.Full):
            waiting.put_nowait(None)
        thread.join(LAST_LINES_SECONDS)


def _write(waiting: queue.Queue[logging.LogRecord | None], writer: logging.Handler) -> None:
    while (record := waiting.get()) is not None:
        writer.handle(record)


def log_to_stderr(log_format: str) -> contextlib.AbstractContextManager[None]:
    """Write the log to standard error."""
    return logging_to(sys.stderr, log_format)
