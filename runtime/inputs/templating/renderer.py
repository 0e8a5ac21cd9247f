"""Chat templates, rendered in a process of their own: a template is a stranger's program."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping

# A template of the hub takes less than a millisecond and writes little more than it is given.
MAX_SECONDS = 5.0
MAX_BYTES = 2**29
MAX_CHARACTERS = 2**22
WORKER = Path(__file__).with_name("worker.py")
# What the worker imports beside the standard library.
PACKAGES = ("jinja2", "markupsafe")


class TemplateFailedError(PromptError):
    """A template that raised something, or that cannot write what it was given."""


class TemplateRenderer:
    """Renders one chat template as `apply_chat_template` of transformers does. Several threads may use it at once.

    Args:
        source: the Jinja template.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        # The worker answers one after the other.
        self._lock = Lock()

    def start(self) -> None:
        """Start the process, without waiting until it is ready; where that fails, `render` says so."""
        with self._lock, contextlib.suppress(OSError):
            self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template.

        Args:
            variables: what it may use, plain values.

        Raises:
            TemplateFailedError: it raises something, or takes too much memory, or writes too much.
            PromptError: it runs for too long, or its process ended or cannot be started.
        """
        line = json.dumps({"source": self._source, "variables": variables}).encode() + b"\n"
        with self._lock:
            try:
                found = json.loads(self._ask(line))
            except BaseException as error:
                # An answer that nobody waited for must not be the next one's.
                self._stop()
                if isinstance(error, OSError | json.JSONDecodeError):
                    raise PromptError(f"{self.name} failed: {error}") from error
                raise
        if "error" in found:
            raise TemplateFailedError(f"{self.name} failed: {found['error']}")
        return str(found["text"])

    def close(self) -> None:
        """End the process; it starts anew where it is needed again."""
        with self._lock:
            self._stop()

    @property
    def name(self) -> str:
        """How messages call the template."""
        return f"the chat template {self._source[:60]!r}"

    def _ask(self, line: bytes) -> bytes:
        deadline = time.monotonic() + MAX_SECONDS
        worker = self._start()
        assert worker.stdin is not None, "it was opened with pipes"
        assert worker.stdout is not None, "it was opened with pipes"
        worker.stdin.write(line)
        worker.stdin.flush()
        answer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                # Read by the descriptor: a selector does not see what a buffered reader holds back.
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PromptError(f"{self.name} was stopped: it ran for more than {MAX_SECONDS:.0f} seconds")
                piece = os.read(worker.stdout.fileno(), 2**16)
                if not piece:
                    raise OSError(f"its process ended with exit code {worker.wait()}")
                answer += piece
        return bytes(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        # After a fork, the worker answers the process that started it.
        is_ours = self._owner == os.getpid()
        if self._worker is None or not is_ours or self._worker.poll() is not None:
            self._owner = os.getpid()
            self._worker = subprocess.Popen(
                # Isolated, and without the site's startup code: the worker needs Jinja alone.
                [sys.executable, "-I", "-S", str(WORKER), json.dumps(_settings())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C in a terminal is not for it.
                start_new_session=True,
            )
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None or self._owner != os.getpid():
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self) -> None:
        self._stop()


def _settings() -> dict[str, Any]:
    """The worker's limits, and the folders from which this process would import what the worker needs."""
    specs = [find_spec(package) for package in PACKAGES]
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None]
    return {
        "folders": list(dict.fromkeys(folders)),
        "max_bytes": MAX_BYTES,
        "max_characters": MAX_CHARACTERS,
        "max_seconds": MAX_SECONDS,
    }
