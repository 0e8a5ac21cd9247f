"""Memory of the KV cache: only positions that a slot holds take any, and it goes back when they are forgotten."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hivtp.runtime.language.kv_cache import KvCache
from hivtp.runtime.language.pages import Pages
from hivtp_ops.errors import OutOfMemoryError

MIB = 2**20
NUM_HEADS, CAPACITY, HEAD_SIZE = 4, 4096, 64


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def cache() -> KvCache:
    """Keys and values of two layers, in four memories of 12 MiB."""
    manifest: Any = SimpleNamespace(num_layers=2, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE)
    return KvCache(manifest, 3, CAPACITY, np.dtype(np.float32), "cpu")


def fill(cache: KvCache, slot: int, num_positions: int) -> None:
    for memory in cache._memories:
        memory.array[slot, :, :num_positions] = slot + 1


def test_what_was_never_written_takes_no_memory():
    before = resident_bytes()
    pages = Pages((256, MIB), np.dtype(np.uint8))
    assert not pages.array[::16, ::4096].any()
    pages.array[::16, 0] = 1
    assert resident_bytes() - before < 4 * MIB


def test_whole_pages_go_back_and_read_as_zeros():
    pages = Pages((64 * MIB,), np.dtype(np.uint8))
    pages.array[:] = 7
    before = resident_bytes()
    pages.release(100, 64 * MIB - 100)
    assert before - resident_bytes() > 60 * MIB
    assert pages.array[:100].tolist() == pages.array[-100:].tolist() == [7] * 100
    assert not pages.array[8192:-8192].any()
    pages.array[MIB] = 5
    assert pages.array[MIB] == 5
    pages.release(8, 16)
    assert pages.array[12] == 7


def test_more_than_there_is_is_a_memory_error():
    for size in (2**60, 2**70):
        with pytest.raises(MemoryError):
            Pages((size,), np.dtype(np.uint8))
    manifest: Any = SimpleNamespace(num_layers=1, num_kv_heads=2**20, head_size=2**20)
    with pytest.raises(OutOfMemoryError):
        KvCache(manifest, 1, 2**20, np.dtype(np.float32), "cpu")


def test_a_short_sequence_takes_the_memory_of_a_short_sequence(cache: KvCache):
    """numpy's own memory comes in pages of 2 MiB, where the kernel has them: one slot would take 16 MiB at once."""
    before = resident_bytes()
    fill(cache, 1, 64)
    assert resident_bytes() - before < 2 * MIB


@pytest.mark.parametrize("length", [0, 1, 100, 4000])
def test_forgotten_positions_give_their_memory_back(cache: KvCache, length: int):
    for slot in range(3):
        fill(cache, slot, CAPACITY)
    before = resident_bytes()
    cache.release(1, length)
    given_back = before - resident_bytes()
    num_bytes = (CAPACITY - length) * HEAD_SIZE * 4 * NUM_HEADS * 4
    # A page for each head and memory may stay.
    assert num_bytes - 17 * 8192 - MIB / 4 < given_back <= num_bytes + MIB / 4
    for memory in cache._memories:
        assert (memory.array[1, :, :length] == 2).all()
        assert not memory.array[1, :, length + 32 : -32].any()
        assert (memory.array[0] == 1).all()
        assert (memory.array[2] == 3).all()
