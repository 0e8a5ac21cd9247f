"""A server of vLLM in a process of its own, on this machine's CPU: for the tests of the plugin and its benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {
    "llava": "HivtpLlavaForConditionalGeneration",
    "llava_next": "HivtpLlavaNextForConditionalGeneration",
}
# It starts three processes one after the other, each of which imports torch.
START_SECONDS = 600
STOP_SECONDS = 60


@dataclass(frozen=True)
class VllmServer:
    """A server that answers.

    Attributes:
        url: where, without a path.
        process: of the API server, whose end ends all.
        log: what it writes.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End it at once, as a machine that fails does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class VllmServerError(RuntimeError):
    """A server that does not start; holds the end of its log."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(num_threads: int = 1) -> dict[str, str]:
    """Of a process of vLLM, in which this tree comes before what is installed."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def overrides(folder: Path, pruning: dict[str, Any] | None) -> dict[str, Any]:
    """What `--hf-overrides` gets for a checkpoint; None leaves vLLM's own architecture."""
    if pruning is None:
        return {}
    family = json.loads((folder / "config.json").read_text())["model_type"]
    return {"architectures": [ARCHITECTURES[family]], "hivtp": pruning}


@contextlib.contextmanager
def vllm_server(
    folder: Path,
    pruning: dict[str, Any] | None,
    log: Path,
    *arguments: str,
    port: int | None = None,
    num_threads: int = 1,
) -> Iterator[VllmServer]:
    """Serve a checkpoint while the block runs.

    Args:
        folder: of the checkpoint.
        pruning: the plugin's settings; None is vLLM without the plugin.
        log: takes what the server writes.
        *arguments: of the command line, besides those that follow from the others.
        port: where it listens; None takes a free one.
        num_threads: of its engine.

    Raises:
        VllmServerError: it ends before it answers.
    """
    url = f"http://127.0.0.1:{port or free_port()}"
    # The package for CPUs has another name than its command looks up, so that `vllm serve` fails there.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", url.rpartition(":")[2]),
        *("--hf-overrides", json.dumps(overrides(folder, pruning))),
        *("--dtype", "float32", "--enforce-eager"),
        *arguments,
    ]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(num_threads),
            start_new_session=True,
        )
    server = VllmServer(url, process, log)
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        # Its children are in its group, and outlive it where it was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def core_seconds(server: VllmServer) -> float:
    """Core-seconds that all processes of a server have taken; 0 without /proc."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the program comes before the bracket, and may hold anything.
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[2]) == server.process.pid:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _wait_until_it_answers(server: VllmServer) -> None:
    ends_at = time.monotonic() + START_SECONDS
    while time.monotonic() < ends_at:
        if server.process.poll() is not None:
            raise VllmServerError(server.log.read_text(errors="replace")[-6000:])
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{server.url}/health") as found,
        ):
            if found.status == 200:
                return
        time.sleep(0.5)
    raise VllmServerError(f"{server.url} did not answer within {START_SECONDS} seconds")
