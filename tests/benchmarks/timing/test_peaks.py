from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.timing import peaks
from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import Results
from benchmarks.timing.peaks import NAME, in_words, measure_with_peaks, open_peaks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from benchmarks.timing.harness import System


def test_the_peaks_are_the_best_that_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "PRODUCT_SIDE", {"cpu": 256})
    monkeypatch.setattr(peaks, "COPIED_SIDE", {"cpu": 512})
    sample = open_peaks(1, "cpu")()
    # Any machine of these years does a thousandth of this at least, and none a thousand times as much.
    assert 1e8 < sample["flops_per_s"] < 1e14
    assert 1e8 < sample["bytes_per_s"] < 1e13
    assert sample["bytes_per_s"] == max(sample["copied_bytes_per_s"], sample["read_bytes_per_s"])


def test_they_are_the_best_of_the_rounds_in_which_the_systems_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(systems: Sequence[System], num_rounds: int, num_threads: int, waits_for_quiet: bool) -> Results:
        *others, last = systems
        assert (others, last.open, last.arguments) == (["ours"], open_peaks, {"device": "cpu"})
        assert (num_rounds, num_threads, waits_for_quiet) == (2, 3, False)
        rates = [{"flops_per_s": 2e9, "bytes_per_s": 5e9}, {"flops_per_s": 4e9, "bytes_per_s": 3e9}]
        return Results({"ours": [{"ms": 7.0}], last.name: rates}, [0.0, 0.1])

    monkeypatch.setattr(peaks, "measure", measured)
    found, best, of_peaks = measure_with_peaks(["ours"], 2, 3, "cpu", waits_for_quiet=False)
    assert best == Peaks(flops_per_s=4e9, bytes_per_s=5e9)
    assert found == Results({"ours": [{"ms": 7.0}]}, [0.0, 0.1])
    assert list(of_peaks.samples) == [NAME]
    assert in_words(of_peaks) == f"{NAME}: 3 GFLOP/s (2 to 4), 4 GB/s (3 to 5)"
