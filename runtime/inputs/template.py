"""Chat templates, rendered in a process of their own: a template is a stranger's program."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping

# A template of the hub takes less than a millisecond and writes little more than it is given.
MAX_SECONDS = 5.0
MAX_BYTES = 2**30
MAX_CHARACTERS = 2**23
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateRenderer:
    """Renders one chat template as `apply_chat_template` of transformers does. Several threads may use it at once.

    Args:
        source: the Jinja template.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._worker: subprocess.Popen[bytes] | None = None
        # The worker answers one after the other.
        self._lock = Lock()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template.

        Args:
            variables: what it may use, plain values.

        Raises:
            PromptError: it raises something, or takes too long, or writes too much.
        """
        line = json.dumps({"source": self._source, "variables": variables}).encode() + b"\n"
        with self._lock:
            try:
                found = json.loads(self._ask(line))
            except BaseException as error:
                # An answer that nobody waited for must not be the next one's.
                self._stop()
                if isinstance(error, OSError | json.JSONDecodeError):
                    raise PromptError(f"{self.name} failed: its process ended ({error})") from error
                raise
        if "error" in found:
            raise PromptError(f"{self.name} failed: {found['error']}")
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
        worker = self._start()
        assert worker.stdin is not None, "it was opened with pipes"
        assert worker.stdout is not None, "it was opened with pipes"
        worker.stdin.write(line)
        worker.stdin.flush()
        deadline, answer = time.monotonic() + MAX_SECONDS, b""
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                # Read by the descriptor: a selector does not see what a buffered reader holds back.
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PromptError(f"{self.name} was stopped: it ran for more than {MAX_SECONDS:.0f} seconds")
                piece = os.read(worker.stdout.fileno(), 2**16)
                if not piece:
                    raise OSError(f"exit code {worker.wait()}")
                answer += piece
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                # By path and isolated: the worker needs Jinja alone, and nothing of the caller's folder.
                [sys.executable, "-I", str(WORKER), str(MAX_BYTES), str(MAX_CHARACTERS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C in a terminal is not for it.
                start_new_session=True,
            )
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self) -> None:
        self._stop()
