"""What every language backend offers: embeddings and a KV cache in slots, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hivtp.engines.files import map_array
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hivtp_ops.errors import HivtpError


class Slots(Protocol):
    """The KV cache of several sequences, one in each slot. One thread at a time uses it.

    A run that fails leaves every slot as it was.
    """

    @property
    def num_slots(self) -> int:
        """Sequences that it has room for."""

    @property
    def capacity(self) -> int:
        """Positions that each slot has room for."""

    def length(self, slot: int) -> int:
        """Positions that a slot holds."""

    def prefill(self, slot: int, embeds: NDArray[np.float32], prompt_length: int) -> NDArray[np.float32]:
        """Append a prompt, or a chunk of one, to a slot.

        Args:
            slot: where.
            embeds: [num, hidden] float32; the slot has room for them.
            prompt_length: positions of the whole prompt that are computed, in this and its other chunks.

        Returns:
            The logits [vocab] float32 of the last position, valid until the next run.

        Raises:
            EngineError: the engine failed.
            OutOfMemoryError: memory ran out.
        """

    def step(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> Sequence[NDArray[np.float32] | HivtpError]:
        """Append one position to each of some slots, in one run.

        Args:
            slots: their numbers, ascending.
            embeds: [slots, hidden] float32.

        Returns:
            For each the logits [vocab] float32, valid until the next run, or the error that it alone failed with.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first positions of a slot; `length` is at most what it holds."""

    def reserve(self, capacity: int) -> None:
        """Make room for this many positions in each slot; what the slots hold stays.

        Raises:
            OutOfMemoryError: memory ran out.
        """


class LanguageBackend(Protocol):
    """A decoder and its token embeddings. It knows nothing of images. Several threads may use it at once."""

    @property
    def context_length(self) -> int:
        """Positions of the longest sequence, prompt and answer together."""

    @property
    def kv_bytes_per_position(self) -> int:
        """Memory that one position of one sequence takes in a KV cache."""

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Look up token embeddings: [num_tokens, hidden] float32."""

    def open_slots(self, num_slots: int, capacity: int) -> Slots:
        """A KV cache for this many sequences of this many positions.

        Raises:
            OutOfMemoryError: memory ran out.
        """

    def close(self) -> None:
        """Release the decoder; nothing can be run after this."""


def embedding_table(file: Path, shape: tuple[int, int]) -> NDArray[np.floating]:
    """Map a table [vocab, hidden] of floats into memory; only the vectors that are used are read.

    Raises:
        BundleError: the file is not such a table.
    """
    try:
        return map_array(file, shape)
    except ValueError as error:
        raise BundleError(f"cannot read the embeddings: {error}; copy or export the bundle again") from error
