from __future__ import annotations

import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.runtime.inputs.prepared_image import PreparedImage
from hivtp.runtime.inputs.tile_layout import TileLayout
from hivtp.runtime.vision.cache import CachedEncoder, EmbeddingCache
from hivtp.runtime.vision.encoder import EncodedImage

if TYPE_CHECKING:
    from collections.abc import Sequence


def image(digest: bytes, num_bytes: int) -> EncodedImage:
    return EncodedImage(np.zeros((1, num_bytes // 4), np.float32), (), 1, digest)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = EmbeddingCache(max_bytes=300)
    for key in (b"a", b"b", b"c"):
        cache.put(image(key, 100))
    assert cache.get(b"a") is not None
    cache.put(image(b"d", 100))
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key)] == [b"a", b"c", b"d"]
    assert cache.num_bytes == 300


def test_a_large_entry_drops_several_and_too_large_a_one_none() -> None:
    cache = EmbeddingCache(max_bytes=300)
    for key in (b"a", b"b", b"c"):
        cache.put(image(key, 100))
    cache.put(image(b"huge", 400))
    assert len(cache) == 3
    cache.put(image(b"large", 300))
    assert len(cache) == 1
    assert cache.get(b"large") is not None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(max_bytes=0)
    cache.put(image(b"a", 4))
    assert cache.get(b"a") is None


def test_the_bound_holds_at_every_moment() -> None:
    cache = EmbeddingCache(max_bytes=300)

    class Watched(OrderedDict):
        def __setitem__(self, key: bytes, entry: EncodedImage) -> None:
            assert cache.num_bytes + entry.num_bytes <= cache.max_bytes
            super().__setitem__(key, entry)

    cache._entries = Watched()
    for size in (100, 200, 120, 300, 40, 280):
        cache.put(image(str(size).encode(), size))
    assert list(cache._entries) == [b"280"]


def test_many_threads_never_exceed_the_bound() -> None:
    cache = EmbeddingCache(max_bytes=1000)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for key in rng.integers(30, size=300):
            if cache.get(bytes([key])) is None:
                cache.put(image(bytes([key]), int(rng.integers(1, 50)) * 4))
            assert cache.num_bytes <= 1000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.num_bytes == sum(entry.num_bytes for entry in cache._entries.values())


class FakeEncoder:
    """Encodes to the sum of the pixels, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[PreparedImage]] = []

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        self.asked.append(list(images))
        return [EncodedImage(image.pixel_values.sum(axis=(1, 2, 3))[:, None], (), 1, image.digest) for image in images]


def prepared(value: float, layout: TileLayout | None = None) -> PreparedImage:
    return PreparedImage(np.full((3, 3, 2, 2), value, np.float32), layout)


def test_an_image_is_encoded_once_in_one_call_and_over_calls() -> None:
    encoder = FakeEncoder()
    cached = CachedEncoder(encoder, EmbeddingCache(10_000), "fp32 graph")
    first, second = prepared(1), prepared(2)
    found = cached.encode([first, second, first, prepared(1)])
    assert [len(images) for images in encoder.asked] == [2]
    assert found[0] is found[2] is found[3]
    assert [image.embeds[0, 0] for image in found] == [12, 24, 12, 12]
    assert cached.encode([second]) == [found[1]]
    assert encoder.asked[1:] == [[]]
    assert (cached.cache.num_queries, cached.cache.num_hits) == (3, 1)


def test_the_same_pixels_on_other_tiles_are_another_image() -> None:
    """Layouts with the same pixels unpad differently."""
    encoder = FakeEncoder()
    cached = CachedEncoder(encoder, EmbeddingCache(10_000), "fp32 graph")
    layouts = [TileLayout(1, 2, (2, 4)), TileLayout(2, 1, (4, 2)), TileLayout(1, 2, (2, 3)), None]
    found = cached.encode([prepared(1, layout) for layout in layouts])
    assert len({id(image) for image in found}) == 4
    assert len({image.digest for image in found}) == 4
    cached.encode([prepared(1, TileLayout(2, 1, (4, 3)))])
    assert [len(images) for images in encoder.asked] == [4, 1]


def test_without_a_cache_every_call_encodes() -> None:
    encoder = FakeEncoder()
    cached = CachedEncoder(encoder, EmbeddingCache(0), "fp32 graph")
    for _ in range(2):
        cached.encode([prepared(1), prepared(1)])
    assert [len(images) for images in encoder.asked] == [1, 1]


def test_what_the_cache_holds_cannot_be_changed() -> None:
    [image] = CachedEncoder(FakeEncoder(), EmbeddingCache(10_000), "fp32 graph").encode([prepared(1)])
    with pytest.raises(ValueError, match="read-only"):
        image.embeds[...] = 0


def test_closing_releases_encoder_and_entries() -> None:
    encoder = FakeEncoder()
    cached = CachedEncoder(encoder, EmbeddingCache(10_000), "fp32 graph")
    cached.encode([prepared(1)])
    released = weakref.ref(encoder)
    del encoder
    cached.close()
    assert released() is None
    assert (len(cached.cache), cached.cache.num_bytes) == (0, 0)
