"""Times systems against each other: one process each, one at work at a time, round after round."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from benchmarks.timing.worker import Worker, other_core_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.worker import LocalSystem, Sample, System

# onnxruntime's threads keep spinning for 50 ms after a run and libgomp's for 10 ms, in wait of the next one. That
# is part of how a user runs either, so it stays on; but the next system's turn begins after it.
PAUSE_S = 0.2
# A machine is quiet while other processes take no more than this many cores. A turn waits for that, for a while.
MAX_OTHER_CORES = 0.1
MAX_WAIT_S = 5.0


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

    def first(self, system: str, quantity: str) -> int:
        """A count of one system, which every round gives alike."""
        return int(self.samples[system][0][quantity])


class Stopwatch:
    """Times a `with` block; `ms` holds the milliseconds when it ends."""

    ms: float

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.ms = (time.perf_counter() - self._started) * 1e3


def measure(systems: Sequence[System], num_rounds: int, num_threads: int) -> Results:
    """Time the systems in turns, each in a process of its own; see `measure_in_turns`."""
    with contextlib.ExitStack() as stack:
        workers = []
        for system in systems:
            print(f"  loading {system.name}", flush=True)
            workers.append(stack.enter_context(contextlib.closing(Worker(system, num_threads))))
            # One by one: loading takes more memory than what is loaded.
            workers[-1].wait_until_ready()
        return measure_in_turns(workers, num_rounds)


def measure_once(systems: Sequence[System], num_threads: int) -> Results:
    """One pass of each system, one system after the other: for passes that warm up by themselves.

    Returns:
        One sample of each system; `other_cores` by system.
    """
    samples, other_cores = {}, []
    for system in systems:
        print(f"  {system.name}", flush=True)
        with contextlib.closing(Worker(system, num_threads)) as worker:
            worker.wait_until_ready()
            others, found = _round([worker])
        samples[system.name] = [found[system.name]]
        other_cores.append(others)
    return Results(samples, other_cores)


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
    samples, others, seconds = {}, 0.0, 0.0
    for system in systems:
        _pause()
        started = time.perf_counter()
        samples[system.name], core_s = system.sample()
        seconds += time.perf_counter() - started
        others += core_s
    return others / seconds, samples


def _pause() -> None:
    """Until the machine is quiet, for MAX_WAIT_S at most."""
    deadline = time.perf_counter() + MAX_WAIT_S
    while time.perf_counter() < deadline:
        started, others = time.perf_counter(), other_core_s()
        time.sleep(PAUSE_S)
        if other_core_s() - others <= MAX_OTHER_CORES * (time.perf_counter() - started):
            return
