"""A server under load: `hivtp serve` in a process of its own, or one that somebody else has started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks.serving.client import get

if TYPE_CHECKING:
    from collections.abc import Sequence

START_SECONDS = 120.0
_SAMPLE = re.compile(r"hivtp:(\w+)\{([^}]*)\} (\S+)")


class Target:
    """What is measured.

    Attributes:
        name: in tables.
        url: where it listens.
        pid: of its process; None where that is not known.
    """

    def __init__(self, name: str, url: str, pid: int | None = None) -> None:
        self.name = name
        self.url = url
        self.pid = pid

    @property
    def resident_bytes(self) -> int | None:
        """Memory that it holds now, files that it mapped included; None where that is not known."""
        if self.pid is None:
            return None
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def metrics(self) -> dict[str, float]:
        """The counters of hivtp, by name and bucket; empty for another server."""
        try:
            text = (await get(self.url, "/metrics")).decode()
        except OSError:
            return {}
        return read_metrics(text)


def read_metrics(text: str) -> dict[str, float]:
    """What hivtp says to Prometheus: "name", or "name le" of a bucket, to its value."""
    found = {}
    for name, labels, value in _SAMPLE.findall(text):
        bucket = re.search(r'le="([^"]*)"', labels)
        found[f"{name} {bucket[1]}" if bucket else name] = float(value)
    return found


class HivtpServer(Target):
    """`hivtp serve` of a bundle, ready when the block begins.

    Args:
        name: in tables.
        bundle: what it serves.
        num_threads: of each engine.
        options: further ones of the command line.
    """

    def __init__(self, name: str, bundle: Path, num_threads: int, options: Sequence[str] = ()) -> None:
        super().__init__(name, "")
        self._command = [sys.executable, "-m", "hivtp.main", "serve", str(bundle), "--port=0"]
        self._command += [f"--threads={num_threads}", *options]

    async def __aenter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="hivtp-serve-", suffix=".log")  # noqa: SIM115  till the end
        self._process = subprocess.Popen(self._command, stderr=self._log)
        self.pid = self._process.pid
        deadline = time.monotonic() + START_SECONDS
        while not await self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{Path(self._log.name).read_text()[-2000:]}")
            await asyncio.sleep(0.1)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._process.terminate()
        await asyncio.to_thread(self._process.wait, START_SECONDS)
        self._log.close()

    async def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = map(json.loads, Path(self._log.name).read_text().splitlines())
            self.url = next(line["urls"][0] for line in lines if line["event"] == "listening")
            await get(self.url, "/ready")
            return True
        return False
