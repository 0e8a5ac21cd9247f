from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.timing import environment, harness
from benchmarks.timing.harness import Results, Stopwatch, measure, measure_in_turns, measure_once
from benchmarks.timing.worker import LocalSystem, System

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.timing.worker import Pass, Sample


def open_counting(num_threads: int, log: Path, name: str) -> Pass:
    passes = 0

    def run() -> Sample:
        nonlocal passes
        passes += 1
        with log.open("a") as stream:
            stream.write(f"{name} starts\n{name} ends\n")
        return {
            "pass": passes,
            "process": os.getpid(),
            "omp": int(os.environ["OMP_NUM_THREADS"]),
            "threads": num_threads,
        }

    return run


def open_failing(num_threads: int) -> Pass:
    raise ValueError(f"nothing to time with {num_threads} threads")


def open_dying(num_threads: int) -> Pass:
    return lambda: os._exit(num_threads)


def counting(log: Path, *names: str) -> list[System]:
    return [System(name, open_counting, {"log": log, "name": name}) for name in names]


@pytest.mark.usefixtures("never_waits")
def test_systems_take_turns_and_never_overlap(tmp_path: Path) -> None:
    log = tmp_path / "log"
    measure(counting(log, "A", "B", "C"), num_rounds=2, num_threads=1)
    turn = [f"{name} {event}" for name in "ABC" for event in ("starts", "ends")]
    assert log.read_text().splitlines() == turn * 3


@pytest.mark.usefixtures("never_waits")
def test_each_system_has_a_process_and_the_threads_of_its_own(tmp_path: Path) -> None:
    results = measure(counting(tmp_path / "log", "A", "B"), num_rounds=2, num_threads=3)
    processes = {name: set(results.values(name, "process")) for name in "AB"}
    assert all(len(found) == 1 for found in processes.values())
    assert len({os.getpid()}.union(*processes.values())) == 3
    assert results.values("A", "omp") == results.values("A", "threads") == [3, 3]


@pytest.mark.usefixtures("never_waits")
def test_the_warm_up_is_dropped(tmp_path: Path) -> None:
    results = measure(counting(tmp_path / "log", "A"), num_rounds=3, num_threads=1)
    assert sorted(results.values("A", "pass")) == [2, 3, 4]


def test_the_quietest_rounds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_pause", lambda: None)
    noise = iter([0.9, 0.5, 0.0, 0.8, 0.05])
    honest_round = harness._round
    monkeypatch.setattr(harness, "_round", lambda *arguments: (next(noise), honest_round(*arguments)[1]))
    results = measure(counting(tmp_path / "log", "A"), num_rounds=2, num_threads=1)
    assert results.other_cores == [0.0, 0.05]
    assert results.values("A", "pass") == [3, 5]


@pytest.mark.usefixtures("never_waits")
def test_each_system_gets_one_pass_where_no_warm_up_is_wanted(tmp_path: Path) -> None:
    results = measure_once(counting(tmp_path / "log", "A", "B"), num_threads=1)
    assert (tmp_path / "log").read_text().splitlines() == ["A starts", "A ends", "B starts", "B ends"]
    assert results.values("A", "pass") == results.values("B", "pass") == [1]
    assert len(results.other_cores) == 2


@pytest.mark.usefixtures("never_waits")
def test_the_peak_memory_is_that_of_the_system_and_not_of_the_process_that_started_it(tmp_path: Path) -> None:
    held = bytearray(b"x" * (300 * 2**20))
    results = measure_once(counting(tmp_path / "log", "A"), num_threads=1)
    [peak] = results.values("A", "peak_memory_bytes")
    assert 2**20 < peak < len(held)


def test_what_a_worker_raises_names_its_system() -> None:
    with pytest.raises(RuntimeError, match=r"broken: (.|\n)*ValueError: nothing to time with 2 threads"):
        measure([System("broken", open_failing)], num_rounds=1, num_threads=2)


@pytest.mark.usefixtures("never_waits")
def test_a_worker_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="dying: ended with exit code 7"):
        measure([System("dying", open_dying)], num_rounds=1, num_threads=7)


def test_a_stopwatch_counts_milliseconds() -> None:
    with Stopwatch() as watch:
        time.sleep(0.02)
    assert 20 <= watch.ms < 1000


def test_results_hold_one_quantity_by_round() -> None:
    results = Results({"A": [{"ttft_ms": 1.0, "num_tiles": 5.0}, {"ttft_ms": 2.0, "num_tiles": 5.0}]}, [0.0, 0.0])
    assert results.values("A", "ttft_ms") == [1.0, 2.0]
    assert results.first("A", "num_tiles") == 5


@pytest.mark.usefixtures("never_waits")
def test_systems_of_one_process_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    systems = [LocalSystem(name, open_counting(num_threads=1, log=log, name=name)) for name in "AB"]
    results = measure_in_turns(systems, num_rounds=2)
    assert log.read_text().splitlines()[:8] == ["A starts", "A ends", "B starts", "B ends"] * 2
    assert {int(value) for value in results.values("B", "process")} == {os.getpid()}
    assert min(results.values("A", "pass")) > 1


def test_the_environment_names_what_products_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "CPU_INFO", info)
    info.write_text("processor : 0\nmodel name : A cpu\nflags : fma avx2 avx512_vnni\nprocessor : 1\nmodel name : B\n")
    found = environment.environment(num_threads=2)
    assert (found["cpu"], found["instruction_sets"]) == ("A cpu", ["avx2", "avx512_vnni"])
    info.unlink()
    assert environment.environment(num_threads=2)["instruction_sets"] == []
