from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hivtp.runtime.vision.cache import EmbeddingCache
from hivtp.runtime.vision.encoder import EncodedImage
from hivtp_ops.errors import SettingsError


def image(num_bytes: int) -> EncodedImage:
    return EncodedImage(np.zeros((1, num_bytes // 4), np.float32), (), 1)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = EmbeddingCache(max_bytes=300)
    for key in (b"a", b"b", b"c"):
        cache.put(key, image(100))
    assert cache.get(b"a") is not None
    cache.put(b"d", image(100))
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key)] == [b"a", b"c", b"d"]
    assert cache.num_bytes == 300


def test_a_large_entry_drops_several_and_too_large_a_one_none() -> None:
    cache = EmbeddingCache(max_bytes=300)
    for key in (b"a", b"b", b"c"):
        cache.put(key, image(100))
    cache.put(b"huge", image(400))
    assert len(cache) == 3
    cache.put(b"large", image(300))
    assert len(cache) == 1
    assert cache.get(b"large") is not None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(max_bytes=0)
    cache.put(b"a", image(4))
    assert cache.get(b"a") is None


def test_the_bound_holds_at_every_moment() -> None:
    cache = EmbeddingCache(max_bytes=300)

    class Watched(OrderedDict):
        def __setitem__(self, key: bytes, entry: EncodedImage) -> None:
            assert cache.num_bytes + entry.num_bytes <= cache.max_bytes
            super().__setitem__(key, entry)

    cache._entries = Watched()
    for size in (100, 200, 120, 300, 40, 280):
        cache.put(str(size).encode(), image(size))
    assert list(cache._entries) == [b"280"]


@pytest.mark.parametrize("max_bytes", [-1, 1.5, True, "10"])
def test_a_size_that_is_none_is_refused(max_bytes: object) -> None:
    with pytest.raises(SettingsError, match="size of the cache"):
        EmbeddingCache(max_bytes)


def test_many_threads_never_exceed_the_bound() -> None:
    cache = EmbeddingCache(max_bytes=1000)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for key in rng.integers(30, size=300):
            if cache.get(bytes([key])) is None:
                cache.put(bytes([key]), image(int(rng.integers(1, 50)) * 4))
            assert cache.num_bytes <= 1000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.num_bytes == sum(entry.num_bytes for entry in cache._entries.values())
