"""Caches of fixed size for a transformers model, and the sequences in them: what compiled code can run on."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hivtp.engines.torch.errors import torch_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.language.compiled import CompiledDecoder

MIN_CAPACITY = 1024


class CachePool:
    """Static caches, which are kept for the next sequence, or the next batch of as many rows.

    A CUDA graph is recorded for the memory that it uses, so the same memory should come back. One free cache of each
    number of rows and capacity is kept. Capacities are powers of two from 1,024, and `most`.

    Args:
        model: on its device, in its dtype.
        most: positions of the largest cache of one sequence.
    """

    def __init__(self, model: Any, most: int) -> None:
        self._config = model.config
        self._weight = model.get_input_embeddings().weight
        self._most = most
        self._free: dict[tuple[int, int], Any] = {}

    def take(self, length: int, num_rows: int = 1) -> Any:
        """An empty cache that holds at least so many positions of each row; `give_back` takes it.

        Raises:
            OutOfMemoryError: there is no memory for another.
        """
        capacity = max(MIN_CAPACITY, 1 << (length - 1).bit_length())
        # Rows that are padded on the left may need more than a context.
        if length <= self._most:
            capacity = min(capacity, self._most)
        with torch_errors(self._weight.device):
            cache = self._free.pop((num_rows, capacity), None)
            if cache is None:
                return self._new(num_rows, capacity)
            # What is masked is still multiplied by zero, and a NaN of another sequence would stay one.
            cache.reset()
            return cache

    def give_back(self, cache: Any) -> None:
        """Keep a cache for the next sequence; also called by the garbage collector, so it takes no lock."""
        self._free.setdefault((len(cache.layers[0].keys), capacity_of(cache)), cache)

    def _new(self, num_rows: int, capacity: int) -> Any:
        from transformers.cache_utils import Cache, StaticLayer

        config = self._config
        # All layers keep every position, also those with a sliding window, so that they can be cut.
        cache = Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(config.num_hidden_layers)])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = self._weight
        cache.early_initialization(num_rows, config.num_key_value_heads, head_dim, weight.dtype, weight.device)
        return cache


class StaticSequence:
    """One sequence in a static cache; a DecoderSequence, and a SequenceCache for a chat.

    It moves to a larger cache where it has to, and gives its own back when nothing refers to it any more.

    Args:
        decoder: runs it.
    """

    def __init__(self, decoder: CompiledDecoder) -> None:
        self._decoder = decoder
        self._cache: Any = None
        self._give_back: Callable[[], object] = lambda: None
        self.length = 0

    def reserve(self, length: int) -> None:
        """Make room for so many positions in all, so that a sequence that will grow moves once.

        Raises:
            OutOfMemoryError: the memory of the device ran out.
        """
        self._decoder.call(self._reserve, length)

    def append(self, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderSequence.append."""
        return self._decoder.call(self._append, embeds)

    def cut(self, length: int) -> None:
        """See SequenceCache.cut."""
        assert length <= self.length, "a cache cannot be cut to more than it holds"
        if length < self.length:
            self._decoder.call(self._forget, length)

    def copy_to(self, cache: Any, row: int, start: int) -> None:
        """Copy what it holds into a row of another static cache, from a column on, and zeros before it.

        To be called in the thread of the model.
        """
        stop = start + self.length
        for old, new in zip(self._cache.layers, cache.layers, strict=True):
            for source, target in ((old.keys, new.keys), (old.values, new.values)):
                target[row, :, :start] = 0
                target[row, :, start:stop] = source[0, :, : self.length]

    def _append(self, embeds: Embeddings) -> NDArray[np.float32]:
        padded_length = self._decoder.padded_length(len(embeds), is_first=self.length == 0)
        self._reserve(self.length + padded_length)
        try:
            logits = self._decoder.run(embeds, padded_length, self._cache, is_first=self.length == 0)
        except BaseException:
            # A run that failed may have got through some layers.
            self._forget(self.length)
            raise
        self.length += len(embeds)
        return logits

    def _reserve(self, length: int) -> None:
        if self._cache is not None and capacity_of(self._cache) >= length:
            return
        cache = self._decoder.caches.take(length)
        if self._cache is not None:
            self.copy_to(cache, 0, 0)
            for layer in cache.layers:
                layer.cumulative_length.fill_(self.length)
        self._give_back()
        self._cache = cache
        self._give_back = weakref.finalize(self, self._decoder.caches.give_back, cache)

    def _forget(self, length: int) -> None:
        self.length = length
        if self._cache is not None:
            for layer in self._cache.layers:
                layer.keys[:, :, length:] = 0
                layer.values[:, :, length:] = 0
                layer.cumulative_length.fill_(length)


def capacity_of(cache: Any) -> int:
    """Positions that a static cache has room for."""
    capacity: int = cache.layers[0].max_cache_len
    return capacity
