from __future__ import annotations

import numpy as np

from hivtp.runtime.integrations.polygraphy import memory
from hivtp.runtime.integrations.polygraphy.memory import measure_peak_memory

NUM_BYTES = 100_000_000


def test_the_peak_counts_what_is_given_back_and_starts_anew():
    with measure_peak_memory() as first:
        np.ones(NUM_BYTES, np.uint8).sum()
    with measure_peak_memory() as second:
        np.ones(NUM_BYTES // 10, np.uint8).sum()
    # A page here or there may have been counted already.
    assert 0.9 * NUM_BYTES < first.num_bytes < 2 * NUM_BYTES
    assert second.num_bytes < NUM_BYTES // 2


def test_where_memory_is_not_counted_there_is_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "absent")
    with measure_peak_memory() as peak:
        pass
    assert peak.num_bytes is None
