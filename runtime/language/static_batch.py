"""Several sequences in one cache of fixed size: a step of all of them is one compiled run of one shape."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines.torch.memory import upload
from hivtp.runtime.language.static_cache import StaticSequence, capacity_of
from hivtp.runtime.language.torch_rows import gather
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.language.compiled import CompiledDecoder


class StaticBatch:
    """Sequences that are decoded together; a DecoderBatch, which gives its cache back when nothing refers to it.

    They stand in the rows of one cache with their last positions in one column, so the shorter ones are padded on the
    left. The number of rows is a power of two, so that batches of other sizes run what was compiled already; a row
    without a sequence, or whose sequence has ended, is computed unseen.

    Args:
        decoder: runs them.
        num_sequences: at most.
        longest: positions of the longest prompt.
        num_new: positions after it that there must be room for.

    Raises:
        EngineError: torch failed.
        OutOfMemoryError: there is no memory for the cache.
    """

    def __init__(self, decoder: CompiledDecoder, num_sequences: int, longest: int, num_new: int) -> None:
        self._decoder = decoder
        num_rows = 1 << (num_sequences - 1).bit_length()
        # By slot the row of its sequence; and those of none.
        self._rows: list[int] = []
        self._free = list(reversed(range(num_rows)))
        self._longest = longest
        self._cache = decoder.call(decoder.caches.take, longest + num_new, num_rows)
        weakref.finalize(self, decoder.caches.give_back, self._cache)
        decoder.call(self._begin, num_rows)

    def append(self, slot: int, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderBatch.append."""
        assert slot == len(self._rows), "a sequence begins in the first free slot"
        self._rows.append(self._free.pop())
        # A prompt alone is of a shape that single answers have as well.
        sequence = StaticSequence(self._decoder)
        logits = sequence.append(embeds)
        self._decoder.call(self._take, self._rows[slot], sequence)
        return logits

    def step(self, embeds: Embeddings) -> Sequence[NDArray[np.float32] | HivtpError]:
        """See DecoderBatch.step; what fails, fails for all."""
        logits = attempt(self._decoder.call, self._step, embeds)
        return [logits] * len(self._rows) if isinstance(logits, HivtpError) else list(logits)

    def drop(self, slot: int, last: int) -> None:
        """See DecoderBatch.drop."""
        assert last == len(self._rows) - 1, "the slots in use are the first ones"
        self._free.append(self._rows[slot])
        self._rows[slot] = self._rows[last]
        self._rows.pop()

    def _begin(self, num_rows: int) -> None:
        import torch

        table = self._decoder.table
        self._embeds = table.new_zeros((num_rows, 1, table.shape[1]))
        self._positions = torch.zeros((num_rows, 1), dtype=torch.int64, device=table.device)
        # False where a row is padded; that a position sees none behind it, the model knows.
        self._is_used = torch.ones((num_rows, capacity_of(self._cache)), dtype=torch.bool, device=table.device)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._longest)

    def _take(self, row: int, sequence: StaticSequence) -> None:
        """Copy a prompt's keys and values into a row."""
        start = self._longest - sequence.length
        sequence.copy_to(self._cache, row, start)
        self._positions[row] = sequence.length
        self._is_used[row] = True
        self._is_used[row, :start] = False

    def _step(self, embeds: Embeddings) -> NDArray[np.float32]:
        table = self._decoder.table
        rows = upload(np.array(self._rows), table.device)
        self._embeds.index_copy_(0, rows, gather(embeds, table)[:, None])
        logits = self._decoder.step(self._embeds, self._positions, self._is_used, self._cache)
        self._positions += 1
        return logits[self._rows]
