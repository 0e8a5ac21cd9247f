"""A real `hivtp serve`, killed, or with nowhere to write: only what was in flight is lost, and its client sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.serving import CHAT, body, wait_for
from tests.support.serving_process import SCRIPT, children_of

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = {"max_tokens": 120, "ignore_eos": True}


class Asked:
    """A request in a thread of its own, and what its client saw."""

    def __init__(self, url: str, *, streams: bool) -> None:
        self.text = ""
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self._request = {"json": body("how many", stream=streams, **LONG), "timeout": 60, "trust_env": False}
        self._thread = threading.Thread(target=self._ask, args=(url,))
        self._thread.start()

    def wait(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _ask(self, url: str) -> None:
        try:
            with httpx.stream("POST", url + CHAT, **self._request) as response:
                for part in response.iter_text():
                    self.text += part
                    self.has_begun.set()
        except httpx.HTTPError as error:
            self.error = error


def test_a_killed_server_loses_what_was_in_flight_and_no_more(start: Any):
    server = start("--slots", "2")
    port = server.url.rpartition(":")[2]
    finished = httpx.post(server.url + CHAT, json=body("what"), timeout=60, trust_env=False)
    in_flight = [Asked(server.url, streams=True), Asked(server.url, streams=False)]
    assert in_flight[0].has_begun.wait(30)
    waiting = Asked(server.url, streams=True)
    wait_for(lambda: "hivtp:num_requests_waiting{" in metrics(server.url) and waits(server.url) == 1)
    children = children_of(server.process.pid)
    server.process.kill()
    for asked in (*in_flight, waiting):
        asked.wait()
        # A stream that ends without an error would look like an answer.
        assert isinstance(asked.error, httpx.TransportError)
        assert "[DONE]" not in asked.text
    assert in_flight[0].text.startswith("data: ")
    # The process that renders templates goes with it.
    assert children
    wait_for(lambda: not any(is_alive(child) for child in children))
    again = start("--slots", "2", "--port", port)
    answer = httpx.post(again.url + CHAT, json=body("what"), timeout=60, trust_env=False)
    assert answer.json()["choices"] == finished.json()["choices"]


def metrics(url: str) -> str:
    return httpx.get(url + "/metrics", trust_env=False).text


def waits(url: str) -> float:
    [line] = [line for line in metrics(url).splitlines() if line.startswith("hivtp:num_requests_waiting{")]
    return float(line.rpartition(" ")[2])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def logging_to_nowhere(bundle: Path, kind: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose log goes to a full disk, or to a reader that has gone."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    if kind == "full disk":
        log = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, log = os.pipe()
        os.close(reader)
    command = [sys.executable, str(SCRIPT), str(bundle), "--port", str(port), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    os.close(log)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["full disk", "reader gone"])
def test_a_server_that_cannot_write_its_log_serves_and_ends_well(pruned_bundle: Path, kind: str):
    with logging_to_nowhere(pruned_bundle, kind) as (process, url):

        def is_ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(url + "/ready", trust_env=False).status_code == 200
            return False

        wait_for(is_ready, 60)
        for _ in range(3):
            assert httpx.post(url + CHAT, json=body("what"), timeout=60, trust_env=False).status_code == 200
        # An error is logged as well, and has nowhere to go.
        assert httpx.post(url + CHAT, content=b"{", timeout=60, trust_env=False).status_code == 415
        asked = Asked(url, streams=True)
        assert asked.has_begun.wait(30)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        asked.wait()
        assert asked.error is None
        assert asked.text.endswith("data: [DONE]\n\n")
        process.wait(20)
        assert time.monotonic() - started < 40
        assert process.returncode in (0, 120), "Python itself says 120 where it cannot flush what it wrote"
