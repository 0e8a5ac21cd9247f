from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.timing import peaks
from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import Results
from benchmarks.timing.peaks import NAME, RATES, in_words, measure_with_peaks, open_peaks, open_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.timing.worker import System


def test_the_peaks_are_the_best_that_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "PRODUCT_SIDE", 256)
    monkeypatch.setattr(peaks, "COPIED_SIDE", 512)
    sample = open_peaks(1)()
    # Any machine of these years does a thousandth of this at least, and none a thousand times as much.
    assert all(1e8 < sample[rate] < 1e14 for rate in RATES)
    assert sample["bytes_per_s"] == max(sample["copied_bytes_per_s"], sample["read_bytes_per_s"])


@pytest.mark.parametrize("is_int8", [False, True])
def test_the_product_is_one_of_two_square_matrices(is_int8: bool) -> None:
    product = open_product(64, 1, is_int8=is_int8)()
    random = np.random.default_rng(0)
    if is_int8:
        rows, matrix = random.integers(0, 256, (64, 64), np.uint8), random.integers(-127, 128, (64, 64), np.int8)
        # Exact, also where the usual products of 8 bits are not.
        assert np.array_equal(product, (rows.astype(np.int32) - 128) @ matrix.astype(np.int32))
    else:
        rows, matrix = (random.standard_normal((64, 64), dtype=np.float32) for _ in range(2))
        assert np.allclose(product, rows @ matrix, atol=1e-4)


def test_they_are_the_best_of_the_rounds_in_which_the_systems_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(systems: Sequence[System], num_rounds: int, num_threads: int) -> Results:
        *others, last = systems
        assert (others, last.open, num_rounds, num_threads) == (["ours"], open_peaks, 2, 3)
        rates = [dict(zip(RATES, values, strict=True)) for values in ((2e9, 9e9, 5e9), (4e9, 7e9, 3e9))]
        return Results({"ours": [{"ms": 7.0}], last.name: rates}, [0.0, 0.1])

    monkeypatch.setattr(peaks, "measure", measured)
    found, best, of_peaks = measure_with_peaks(["ours"], 2, 3)
    assert best == Peaks(flops_per_s=4e9, int8_ops_per_s=9e9, bytes_per_s=5e9)
    assert found == Results({"ours": [{"ms": 7.0}]}, [0.0, 0.1])
    assert list(of_peaks.samples) == [NAME]
    expected = "3 GFLOP/s (2 to 4), 8 GOP/s in 8 bits (7 to 9), 4 GB/s (3 to 5)"
    assert in_words(of_peaks) == f"{NAME}: {expected}"
