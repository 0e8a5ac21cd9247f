"""Progress of a build, from the phases within phases that TensorRT reports."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class BuildProgress:
    """Turns phases, each with steps and phases within, into one percentage that never falls."""

    percent: int = 0
    _phases: dict[str, _Phase] = field(default_factory=dict)

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins."""
        self._phases[name] = _Phase(parent, max(1, num_steps))
        self._update()

    def step(self, name: str) -> None:
        """A phase has done a step."""
        if name in self._phases:
            self._phases[name].num_done += 1
            self._update()

    def finish(self, name: str) -> None:
        """A phase ends."""
        phase = self._phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self.percent = 100

    def _update(self) -> None:
        for name, phase in self._phases.items():
            if phase.parent is None:
                self.percent = max(self.percent, int(100 * self._share_of(name)))

    def _share_of(self, name: str) -> float:
        phase = self._phases[name]
        within = max((self._share_of(child) for child, its in self._phases.items() if its.parent == name), default=0.0)
        return min(1.0, (phase.num_done + within) / phase.num_steps)


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    num_done: int = 0


def make_monitor(trt: Any, on_progress: Callable[[int, int], None], should_stop: threading.Event) -> Any:
    """Make TensorRT's IProgressMonitor.

    Args:
        trt: the module.
        on_progress: called with (percent done, 100) when the percentage rises.
        should_stop: once it is set, the builder gives up at its next step.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        """TensorRT calls it from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._progress = BuildProgress()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._report(lambda: self._progress.start(phase_name, parent_phase, num_steps))

        def phase_finish(self, phase_name: str) -> None:
            self._report(lambda: self._progress.finish(phase_name))

        def step_complete(self, phase_name: str, _step: int) -> bool:
            self._report(lambda: self._progress.step(phase_name))
            return not should_stop.is_set()

        def _report(self, change: Callable[[], None]) -> None:
            with self._lock:
                before = self._progress.percent
                change()
                if self._progress.percent > before:
                    on_progress(self._progress.percent, 100)

    return Monitor()
