"""A server in a process of its own, which can be stopped, killed and measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.support.serving import CHAT, body, log_lines

SCRIPT = Path(__file__).with_name("serve_slowly.py")


class Process:
    """A server of its own."""

    def __init__(self, bundle: Path, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(bundle), "--port", "0", "--threads", "1", *arguments],
                stderr=file,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self.url = self._wait_for_url()

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(json.JSONDecodeError, StopIteration):
                line = next(line for line in log_lines(self.log) if line["event"] == "listening")
                if httpx.get(line["urls"][0] + "/ready", trust_env=False).status_code == 200:
                    return line["urls"][0]
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stream_in_thread(self, max_tokens: int) -> tuple[threading.Thread, list[str]]:
        """A streamed answer that begins before this returns."""
        parts: list[str] = []
        has_begun = threading.Event()

        def read() -> None:
            content = body("how many", max_tokens=max_tokens, ignore_eos=True, stream=True)
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", self.url + CHAT, json=content, timeout=60, trust_env=False) as response,
            ):
                for part in response.iter_text():
                    parts.append(part)
                    has_begun.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert has_begun.wait(30)
        return thread, parts

    @property
    def num_resident_bytes(self) -> int:
        """Memory that it has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
