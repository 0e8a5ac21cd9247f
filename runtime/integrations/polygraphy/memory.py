"""The memory that an action takes at its peak, where the system counts it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROCESS = Path("/proc/self")
# Written to clear_refs, it sets the peak to what the process holds now (man 5 proc).
_RESET_PEAK = "5"


class PeakMemory:
    """What a block of code took.

    Attributes:
        num_bytes: memory of the host at the peak, beyond what the process held before; None where it is not counted.
    """

    num_bytes: int | None = None


@contextlib.contextmanager
def measure_peak_memory() -> Iterator[PeakMemory]:
    """Measure a block; what it imports counts, and so does what it keeps."""
    peak = PeakMemory()
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        before = _resident_bytes("VmRSS")
    except (OSError, KeyError):
        before = None
    yield peak
    if before is not None:
        peak.num_bytes = max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024
