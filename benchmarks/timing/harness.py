"""Times systems against each other: one process each, one at work at a time, round after round."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


# What one timed pass measured: times in milliseconds and counts, by name.
Sample = dict[str, float]
# Does one pass.
Pass = Callable[[], Sample]

# Those that are installed are named.
PACKAGES = (
    "hivtp",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "Pillow",
)
# onnxruntime's threads keep spinning for 50 ms after a run and libgomp's for 10 ms, in wait of the next one. That
# is part of how a user runs either, so it stays on; but the next system's turn begins after it.
PAUSE_S = 0.2
CPU_INFO = Path("/proc/cpuinfo")
# What the speed of matrix products on a CPU depends on most, where it has them.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# A machine is quiet while other processes take no more than this many cores. A turn waits for that, for a while.
MAX_OTHER_CORES = 0.1
MAX_WAIT_S = 5.0


@dataclass(frozen=True)
class System:
    """One thing to time.

    Attributes:
        name: of its row.
        open: a module-level function that imports and loads what it needs and returns the pass to time; or several, by
            the names of their rows, which share what does not fit into memory twice.
        arguments: for `open`, beside `num_threads`.
        is_optional: where it cannot be opened, it is named with the reason and left out.
    """

    name: str
    open: Callable[..., Pass | Mapping[str, Pass]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_optional: bool = False


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

    def wait_until_ready(self) -> list[WorkerSystem]:
        """What takes turns, when it is loaded."""
        return [WorkerSystem(name, self) for name in self._receive()]

    def sample(self, name: str) -> tuple[Sample, float]:
        """Do one pass of that name; also the core-seconds of other processes meanwhile."""
        # A process that has ended is named where its answer is missed.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(name)
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


@dataclass(frozen=True)
class WorkerSystem:
    """A system in the process of a worker."""

    name: str
    worker: Worker

    def sample(self) -> tuple[Sample, float]:
        """Do one pass; also the core-seconds of other processes meanwhile."""
        return self.worker.sample(self.name)


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
        opened = system.open(num_threads=num_threads, **system.arguments)
        is_shared = isinstance(opened, Mapping)
        passes = opened if isinstance(opened, Mapping) else {system.name: opened}
        pipe.send(("ready", list(passes)))
        while True:
            run = passes[pipe.recv()]
            others = _other_cpu_s()
            sample = run()
            others = _other_cpu_s() - others
            memory = {} if is_shared else {"peak_memory_bytes": peak_memory_bytes()}
            pipe.send(("sample", (sample | memory, others)))
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


def _other_cpu_s() -> float:
    """Core-seconds since boot of all but this process, the hypervisor's other guests included; 0 without /proc."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    except (OSError, ValueError):
        return 0.0
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(systems: Sequence[System], num_rounds: int, num_threads: int, waits_for_quiet: bool = True) -> Results:
    """Time the systems in turns, each in a process of its own; see `measure_in_turns`."""
    workers: list[Worker] = []
    loaded: list[WorkerSystem] = []
    try:
        for system in systems:
            print(f"  loading {system.name}", flush=True)
            workers.append(Worker(system, num_threads))
            try:
                # One by one: loading takes more memory than what is loaded.
                loaded += workers[-1].wait_until_ready()
            except RuntimeError as error:
                if not system.is_optional:
                    raise
                print(f"  {system.name} is left out: {str(error).strip().splitlines()[-1]}", flush=True)
        return measure_in_turns(loaded, num_rounds, waits_for_quiet)
    finally:
        for worker in workers:
            worker.close()


def measure_once(systems: Sequence[System], num_threads: int) -> Results:
    """One pass of each system, one system after the other: for passes that warm up by themselves.

    Returns:
        One sample of each system; `other_cores` by system.
    """
    rounds = []
    for system in systems:
        print(f"  {system.name}", flush=True)
        with contextlib.closing(Worker(system, num_threads)) as worker:
            rounds.append(_round(worker.wait_until_ready()))
    samples = {name: [sample] for _, by_name in rounds for name, sample in by_name.items()}
    return Results(samples, [other_cores for other_cores, _ in rounds])


def measure_in_turns(
    systems: Sequence[WorkerSystem | LocalSystem], num_rounds: int, waits_for_quiet: bool = True
) -> Results:
    """Time the systems in turns: A B C, A B C, and so on.

    The first round warms up and is dropped. On a machine that is not quiet, up to twice as many rounds
    run and the quietest count: chosen by what other processes took meanwhile, never by the times themselves.
    Where a GPU does the work, other processes on the CPU matter less, and nothing is waited for: all rounds count.
    """
    rounds: list[tuple[float, dict[str, Sample]]] = []
    _round(systems, waits_for_quiet)
    while len(rounds) < (2 * num_rounds if waits_for_quiet else num_rounds):
        rounds.append(_round(systems, waits_for_quiet))
        num_quiet = sum(other_cores <= MAX_OTHER_CORES for other_cores, _samples in rounds)
        print(f"  round {len(rounds)}: others took {rounds[-1][0]:.2f} cores", flush=True)
        if num_quiet == num_rounds:
            break
    rounds = sorted(rounds, key=lambda item: item[0])[:num_rounds]
    samples = {system.name: [samples[system.name] for _, samples in rounds] for system in systems}
    return Results(samples, [other_cores for other_cores, _ in rounds])


def _round(
    systems: Sequence[WorkerSystem | LocalSystem], waits_for_quiet: bool = True
) -> tuple[float, dict[str, Sample]]:
    samples, other_core_s, seconds = {}, 0.0, 0.0
    for system in systems:
        _pause(MAX_WAIT_S if waits_for_quiet else PAUSE_S)
        started = time.perf_counter()
        samples[system.name], others = system.sample()
        seconds += time.perf_counter() - started
        other_core_s += others
    return other_core_s / seconds, samples


def _pause(max_wait_s: float) -> None:
    """Until the machine is quiet, or for so long."""
    deadline = time.perf_counter() + max_wait_s
    while time.perf_counter() < deadline:
        started, others = time.perf_counter(), _other_cpu_s()
        time.sleep(PAUSE_S)
        if _other_cpu_s() - others <= MAX_OTHER_CORES * (time.perf_counter() - started):
            return


def environment(num_threads: int) -> dict[str, Any]:
    """Where the numbers come from: machine, threads, versions and date."""
    flags = _cpu_info("flags", "").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_info("model name", platform.machine()),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "num_cores": os.cpu_count(),
        "num_threads": num_threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        **_gpu(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _gpu() -> dict[str, str]:
    """The GPU that torch sees; nothing where it sees none."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _cpu_info(key: str, default: str) -> str:
    """What the system says of the first processor; the default where it says nothing."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return default
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == key), default)
