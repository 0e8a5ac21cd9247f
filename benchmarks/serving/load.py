"""Load on a server: clients that come whatever it does, and clients that ask as fast as it answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.serving.client import Exchange, ask, get

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from benchmarks.serving.process import Target

SAMPLE_SECONDS = 0.25


@dataclass
class Run:
    """What one load did.

    Attributes:
        seconds: from the first request to the last answer.
        exchanges: all requests.
        resident_bytes: of the server, as time went on.
        health_s: how long /health took.
        lag_s: how late this process itself was, which is part of all times.
        load_average: of the machine at the end, over a minute.
        before: counters of the server.
        after: the same at the end.
    """

    seconds: float = 0.0
    exchanges: list[Exchange] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    load_average: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


async def offer(target: Target, requests: Sequence[bytes], times: Sequence[float]) -> Run:
    """Send each request at its time, whether those before it are answered or not, and wait for all answers."""
    async with _watched(target) as run:
        started = time.perf_counter()

        async def send(content: bytes, at: float) -> Exchange:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            sent_at = time.perf_counter() - started
            found = await ask(target.url, content)
            found.sent_at = sent_at
            return found

        run.exchanges += await asyncio.gather(*map(send, requests, times))
    return run


async def saturate(target: Target, requests: Iterator[bytes], num_clients: int, seconds: float) -> Run:
    """Clients of which each asks again as soon as it has its answer."""
    async with _watched(target) as run:
        deadline = time.perf_counter() + seconds

        async def work() -> None:
            for content in requests:
                run.exchanges.append(await ask(target.url, content))
                if time.perf_counter() > deadline:
                    return

        await asyncio.gather(*(work() for _ in range(num_clients)))
    return run


@contextlib.asynccontextmanager
async def _watched(target: Target) -> AsyncIterator[Run]:
    run = Run(before=await target.metrics())
    watching = asyncio.create_task(_watch(target, run))
    started = time.perf_counter()
    try:
        yield run
    finally:
        run.seconds = time.perf_counter() - started
        watching.cancel()
        run.after = await target.metrics()
        run.load_average = os.getloadavg()[0]


async def _watch(target: Target, run: Run) -> None:
    while True:
        started = time.perf_counter()
        with contextlib.suppress(OSError):
            await get(target.url, "/health")
        run.health_s.append(time.perf_counter() - started)
        if (size := target.resident_bytes) is not None:
            run.resident_bytes.append(size)
        started = time.perf_counter()
        await asyncio.sleep(SAMPLE_SECONDS)
        run.lag_s.append(time.perf_counter() - started - SAMPLE_SECONDS)
