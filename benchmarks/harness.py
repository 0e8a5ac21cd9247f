"""Times systems against each other: one process each, one at work at a time, round after round."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection


# What one timed pass measured: times in milliseconds and counts, by name.
Sample = dict[str, float]
# Does one pass.
Pass = Callable[[], Sample]

PACKAGES = ("hivtp", "torch", "transformers", "onnxruntime", "onnxruntime-genai", "numpy", "Pillow")
# onnxruntime's threads keep spinning for 50 ms after a run and libgomp's for 10 ms, in wait of the next one. That
# is part of how a user runs either, so it stays on; but the next system's turn begins after it.
PAUSE_S = 0.2
# A machine is quiet while other processes take no more than this many cores. A turn waits for that, for a while.
MAX_OTHER_CORES = 0.1
MAX_WAIT_S = 5.0


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


@dataclass(frozen=True)
class Results:
    """Samples of all systems.

    Attributes:
        samples: by system, one per round; round i of one system ran next to round i of the others.
        other_cores: per round, how many cores other processes took on average.
    """

    samples: Mapping[str, Sequence[Sample]]
    other_cores: Sequence[float]

    def values(self, system: str, quantity: str) -> list[float]:
        """One quantity of one system, by round."""
        return [sample[quantity] for sample in self.samples[system]]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: what was timed.
        values_ms: its times, one per round.
        baseline_ms: what they are compared with, one per round.
        goal: the ratio to reach at most; None where there is none.
    """

    label: str
    values_ms: Sequence[float]
    baseline_ms: Sequence[float]
    goal: float | None = None

    @property
    def ratio(self) -> float:
        """The median over the rounds of the time by the baseline's of the same round."""
        return median(value / base for value, base in zip(self.values_ms, self.baseline_ms, strict=True))

    @property
    def verdict(self) -> str:
        """Whether the goal is met; empty where there is none."""
        if self.goal is None:
            return ""
        return "met" if self.ratio <= self.goal else "missed"


class Stopwatch:
    """Times a `with` block; `ms` holds the milliseconds when it ends."""

    ms: float

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.ms = (time.perf_counter() - self._started) * 1e3


class Worker:
    """A system in a process of its own, which is then just the process of a user who runs it alone.

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
        """Return when the system is loaded."""
        self._receive()

    def sample(self) -> tuple[Sample, float]:
        """Do one pass; also the core-seconds of other processes meanwhile."""
        self._pipe.send("pass")
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
        others = _other_cpu_s()
        sample = self._run()
        return sample, _other_cpu_s() - others


def _serve(pipe: Connection, system: System, num_threads: int) -> None:
    # libgomp reads it when torch is imported, which `open` does.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    try:
        run = system.open(num_threads=num_threads, **system.arguments)
        pipe.send(("ready", None))
        while pipe.recv() == "pass":
            others = _other_cpu_s()
            sample = run()
            others = _other_cpu_s() - others
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send(("sample", ({**sample, "peak_memory_bytes": peak_bytes}, others)))
    except EOFError:
        return
    except Exception:  # noqa: BLE001  whatever it is, the parent raises it
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("error", traceback.format_exc()))


def _other_cpu_s() -> float:
    """Core-seconds since boot of all but this process, the hypervisor's other guests included; 0 without /proc."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    except (OSError, ValueError):
        return 0.0
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(systems: Sequence[System], num_rounds: int, num_threads: int) -> Results:
    """Time the systems in turns, each in a process of its own; see `measure_in_turns`."""
    workers: list[Worker] = []
    try:
        print(f"  loading {len(systems)} systems", flush=True)
        workers = [Worker(system, num_threads) for system in systems]
        for worker in workers:
            worker.wait_until_ready()
        return measure_in_turns(workers, num_rounds)
    finally:
        for worker in workers:
            worker.close()


def measure_in_turns(systems: Sequence[Worker | LocalSystem], num_rounds: int) -> Results:
    """Time the systems in turns: A B C, A B C, and so on.

    The first round warms up and is dropped. On a machine that is not quiet, up to twice as many rounds
    run and the quietest count: chosen by what other processes took meanwhile, never by the times themselves.
    """
    rounds: list[tuple[float, dict[str, Sample]]] = []
    _round(systems)
    while len(rounds) < 2 * num_rounds:
        rounds.append(_round(systems))
        num_quiet = sum(other_cores <= MAX_OTHER_CORES for other_cores, _samples in rounds)
        print(f"  round {len(rounds)}: others took {rounds[-1][0]:.2f} cores", flush=True)
        if num_quiet == num_rounds:
            break
    rounds = sorted(rounds, key=lambda item: item[0])[:num_rounds]
    samples = {system.name: [samples[system.name] for _, samples in rounds] for system in systems}
    return Results(samples, [other_cores for other_cores, _ in rounds])


def _round(systems: Sequence[Worker | LocalSystem]) -> tuple[float, dict[str, Sample]]:
    samples, other_core_s, seconds = {}, 0.0, 0.0
    for system in systems:
        _wait_until_quiet()
        started = time.perf_counter()
        samples[system.name], others = system.sample()
        seconds += time.perf_counter() - started
        other_core_s += others
    return other_core_s / seconds, samples


def _wait_until_quiet() -> None:
    deadline = time.perf_counter() + MAX_WAIT_S
    while time.perf_counter() < deadline:
        started, others = time.perf_counter(), _other_cpu_s()
        time.sleep(PAUSE_S)
        if _other_cpu_s() - others <= MAX_OTHER_CORES * (time.perf_counter() - started):
            return


def table(title: str, rows: Sequence[Row]) -> str:
    """Medians, ranges and ratios to the baseline, beside the goals."""
    width = max(len(text) for text in (title, *(row.label for row in rows)))
    lines = [f"{title:<{width}}  {'median ms':>10} {'min':>9} {'max':>9} {'ratio':>8} {'goal':>7}"]
    for row in rows:
        values = row.values_ms
        line = f"{row.label:<{width}}  {median(values):10.2f} {min(values):9.2f} {max(values):9.2f} {row.ratio:8.4f}"
        goal = "" if row.goal is None else f"{row.goal:7.3f}  {row.verdict}"
        lines.append(f"{line} {goal}".rstrip())
    return "\n".join(lines)


def environment(num_threads: int) -> dict[str, Any]:
    """Where the numbers come from: machine, threads, versions and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "num_threads": num_threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(options: argparse.Namespace, tables: Mapping[str, Sequence[Row]], results: Mapping[str, Results]) -> None:
    """Print the tables and write everything that was measured."""
    found = environment(options.threads)
    print("\n".join(f"{key}: {value}" for key, value in found.items()))
    most = max(max(result.other_cores) for result in results.values())
    print(f"cores that other processes took: at most {most:.2f} in a round")
    for title, rows in tables.items():
        print(f"\n{table(title, rows)}")
    written = {
        "environment": found,
        # Where things lay on this machine says nothing on another.
        "settings": {key: str(value) for key, value in vars(options).items() if not isinstance(value, Path)},
        "rows": [
            {"table": title, "ratio": row.ratio, "verdict": row.verdict, **asdict(row)}
            for title, rows in tables.items()
            for row in rows
        ],
        "results": {name: asdict(result) for name, result in results.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"\nall samples: {options.output}")
