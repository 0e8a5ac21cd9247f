from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import peaks
from benchmarks.floor import Peaks
from benchmarks.harness import Results
from benchmarks.peaks import NAME, measure_peaks, open_peaks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from benchmarks.harness import System


def test_the_peaks_are_the_best_that_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "PRODUCT_SIDE", {"cpu": 256})
    monkeypatch.setattr(peaks, "COPIED_SIDE", {"cpu": 512})
    sample = open_peaks(1, "cpu")()
    # Any machine of these years does a thousandth of this at least, and none a thousand times as much.
    assert 1e8 < sample["flops_per_s"] < 1e14
    assert 1e8 < sample["bytes_per_s"] < 1e13
    assert sample["bytes_per_s"] == max(sample["copied_bytes_per_s"], sample["read_bytes_per_s"])


def test_they_are_read_from_the_sample_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(systems: Sequence[System], num_threads: int) -> Results:
        [system] = systems
        assert (system.open, system.arguments, num_threads) == (open_peaks, {"device": "cpu"}, 3)
        return Results({system.name: [{"flops_per_s": 2.0, "bytes_per_s": 3.0}]}, [0.0])

    monkeypatch.setattr(peaks, "measure_once", measured)
    found, results = measure_peaks("cpu", 3)
    assert found == Peaks(flops_per_s=2.0, bytes_per_s=3.0)
    assert list(results.samples) == [NAME]
