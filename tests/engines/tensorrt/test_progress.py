from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hivtp.engines.tensorrt.progress import make_monitor


class IProgressMonitor:
    """The base class that TensorRT's module has."""


@pytest.fixture
def seen() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def should_stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def monitor(seen: list[tuple[int, int]], should_stop: threading.Event) -> Any:
    module = SimpleNamespace(IProgressMonitor=IProgressMonitor)
    return make_monitor(module, lambda done, total: seen.append((done, total)), should_stop)


def test_the_steps_of_the_outermost_phase_are_counted_and_no_others(monitor, seen):
    monitor.phase_start("build", None, 3)
    monitor.phase_start("parse", "build", 10)
    for step in range(10):
        assert monitor.step_complete("parse", step)
    monitor.phase_finish("parse")
    monitor.step_complete("build", 0)
    # TensorRT announces a phase anew under the same name.
    for _ in range(2):
        monitor.phase_start("time", "build", 2)
        monitor.step_complete("time", 0)
        monitor.phase_finish("time")
    monitor.step_complete("build", 1)
    # It does not always report the last step.
    monitor.phase_finish("build")
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_second_outermost_phase_adds_its_steps(monitor, seen):
    monitor.phase_start("build", None, 2)
    monitor.phase_finish("build")
    monitor.phase_start("write", None, 2)
    monitor.step_complete("write", 0)
    assert seen == [(0, 2), (2, 2), (2, 4), (3, 4)]


def test_steps_that_were_not_announced_or_are_too_many_do_no_harm(monitor, seen):
    monitor.step_complete("unknown", 0)
    monitor.phase_finish("unknown")
    monitor.phase_start("build", None, 0)
    for step in range(5):
        monitor.step_complete("build", step)
    assert set(seen) == {(0, 1), (1, 1)}


def test_a_build_that_is_to_stop_is_told_so_at_its_next_step_of_whatever_phase(monitor, should_stop):
    monitor.phase_start("build", None, 3)
    monitor.phase_start("parse", "build", 10)
    assert monitor.step_complete("parse", 0)
    should_stop.set()
    assert not monitor.step_complete("parse", 1)
    assert not monitor.step_complete("build", 0)
