"""Progress of a build: the steps of TensorRT's outermost phase, and nothing guessed from the phases within."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def make_monitor(trt: Any, on_progress: Callable[[int, int], None], should_stop: threading.Event) -> Any:
    """Make TensorRT's IProgressMonitor.

    The phases within a step take most of the time and say nothing of how much is left: of a build of 2.3 seconds, 2.2
    were one phase of one step. So they are not counted.

    Args:
        trt: the module.
        on_progress: called with (steps done, all steps) after each step of the outermost phase, from other threads.
        should_stop: once it is set, the builder gives up at its next step, of whatever phase.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        """TensorRT calls it from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.RLock()
            # Steps of each outermost phase, done and all.
            self._phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._set(phase_name, 0, max(1, num_steps))

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                if phase_name in self._phases:
                    _, num_all = self._phases[phase_name]
                    self._set(phase_name, num_all, num_all)

        def step_complete(self, phase_name: str, _step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    num_done, num_all = self._phases[phase_name]
                    self._set(phase_name, min(num_done + 1, num_all), num_all)
            return not should_stop.is_set()

        def _set(self, phase_name: str, num_done: int, num_all: int) -> None:
            with self._lock:
                self._phases[phase_name] = (num_done, num_all)
                done, all_steps = (sum(numbers) for numbers in zip(*self._phases.values(), strict=True))
                on_progress(done, all_steps)

    return Monitor()
