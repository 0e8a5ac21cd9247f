"""A system in another environment: a process that answers a line of JSON for each line that it gets."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.timing.worker import Sample


class ForeignWorker:
    """Takes turns as `benchmarks.timing.worker.Worker` does.

    Args:
        name: of its row.
        command: starts the process, which says that it is ready, and then answers with a sample.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        """Until it is loaded."""
        self.about = self._receive()

    def sample(self) -> tuple[Sample, float]:
        """Do one pass; also the core-seconds of other processes meanwhile."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        found = self._receive()
        return found["sample"], found["others"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            # Libraries print, too.
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name}: ended with exit code {self._process.wait()}")
