"""One system in a process of its own, which does a pass whenever it is its turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# What one timed pass measured: times in milliseconds and counts, by name.
Sample = dict[str, float]
# Does one pass.
Pass = Callable[[], Sample]


@dataclass(frozen=True)
class System:
    """One thing to time.

    Attributes:
        name: of its row.
        open: a module-level function that imports and loads what it needs and returns the pass to time.
        arguments: for `open`, beside `num_threads`.
    """

    name: str
    open: Callable[..., Pass]
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A system in a process of its own, as a user runs it who runs nothing else.

    In one process, the systems' thread pools would take each other's cores, and the settings of one (threads,
    allocator, warm caches) would be those of all.
    """

    def __init__(self, system: System, num_threads: int) -> None:
        self.name = system.name
        context = multiprocessing.get_context("spawn")
        self._pipe, pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(pipe, system, num_threads), daemon=True)
        self._process.start()
        pipe.close()

    def wait_until_ready(self) -> None:
        """Until it is loaded."""
        self._receive()

    def sample(self) -> tuple[Sample, float]:
        """Do one pass; also the core-seconds of other processes meanwhile."""
        # A process that has ended is named where its answer is missed.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send("run")
        sample, other_core_s = self._receive()
        return sample, other_core_s

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(f"{self.name}: ended with exit code {self._process.exitcode}") from error
        if kind == "error":
            raise RuntimeError(f"{self.name}: {content}")
        return content


class LocalSystem:
    """A system in this process, for those that share what does not fit into memory twice."""

    def __init__(self, name: str, run: Pass) -> None:
        self.name = name
        self._run = run

    def sample(self) -> tuple[Sample, float]:
        """Do one pass; also the core-seconds of other processes meanwhile."""
        others = other_core_s()
        sample = self._run()
        return sample, other_core_s() - others


def _serve(pipe: Connection, system: System, num_threads: int) -> None:
    # libgomp reads it when torch is imported, which `open` does.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    try:
        local = LocalSystem(system.name, system.open(num_threads=num_threads, **system.arguments))
        pipe.send(("ready", None))
        while pipe.recv():
            sample, others = local.sample()
            pipe.send(("sample", (sample | {"peak_memory_bytes": peak_memory_bytes()}, others)))
    except EOFError:
        return
    except Exception:  # noqa: BLE001  whatever it is, the parent raises it
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("error", traceback.format_exc()))


def peak_memory_bytes() -> int:
    """The most memory that this process held at once, files that it mapped included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        [peak] = (line.split() for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Not ru_maxrss where it can be helped: it begins with what the parent held when it started this process.
    return int(peak[1]) * 1024


def other_core_s() -> float:
    """Core-seconds since boot of all but this process, the hypervisor's other guests included; 0 without /proc."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    except (OSError, ValueError):
        return 0.0
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
