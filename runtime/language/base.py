"""What every language backend offers: embeddings and a KV cache in slots, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from hivtp.engines.files import map_array
from hivtp_ops.errors import BundleError, EngineError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.engines.manifest import LanguageManifest
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

    def step(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one position to each of some slots, in one run.

        Args:
            slots: their numbers, ascending.
            embeds: [slots, hidden] float32.

        Returns:
            The logits [slots, vocab] float32, valid until the next run.

        Raises:
            EngineError: the engine failed.
            OutOfMemoryError: memory ran out.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first positions of a slot; `length` is at most what it holds.

        On the CPU the memory of the others goes back to the system, so that all slots together take what they hold.
        """

    def reserve(self, capacity: int) -> None:
        """Make room for this many positions in each slot; what the slots hold stays.

        Raises:
            OutOfMemoryError: memory ran out.
        """


class DecodeRequest(Protocol):
    """A sequence that a scheduler decodes: its prompt, and what becomes of its tokens."""

    @property
    def embeds(self) -> NDArray[np.float32]:
        """The prompt, [length, hidden] float32, 0 < length < context_length."""

    @property
    def max_new_tokens(self) -> int:
        """At most this many tokens, 1 or more; fewer where the context ends first."""

    @property
    def keys(self) -> Sequence[Hashable] | None:
        """What stands at each position of the prompt: equal keys from the start on mean equal embeddings.

        The tokens of the answer count as keys, too. None where the KV cache of this sequence must never serve another.
        """

    def begin(self, num_cached: int) -> None:
        """Take note that the sequence has a slot, which holds its first `num_cached` positions already."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from the logits [vocab]; what this raises ends this sequence alone."""

    def push(self, token_id: int, milliseconds: float) -> bool:
        """Take a token; whether the sequence goes on after it. What this raises ends this sequence alone.

        Args:
            token_id: what `choose` gave.
            milliseconds: of the runs that led to it: all chunks of the prompt for the first token, then the joint step.
        """

    def fail(self, error: HivtpError) -> None:
        """Take the error that ended the sequence."""


class LanguageBackend(Protocol):
    """A decoder and its token embeddings. It knows nothing of images. Several threads may use it at once."""

    @property
    def description(self) -> str:
        """What decodes, for people: the precision of the weights, what runs them, and in which type it computes."""

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
        """Release the decoder; `embed` and `open_slots` raise an EngineError after this."""


def kv_bytes_per_position(manifest: LanguageManifest, dtype_bytes: int) -> int:
    """Memory that keys and values of one position take, in a dtype of this many bytes."""
    return 2 * manifest.num_layers * manifest.num_kv_heads * manifest.head_size * dtype_bytes


def closed_error() -> EngineError:
    """The error of whoever uses a pipeline after it was closed."""
    return EngineError("this pipeline is closed; load the bundle again")


def embedding_table(file: Path, shape: tuple[int, int]) -> NDArray[np.floating]:
    """Map a table [vocab, hidden] of floats into memory; only the vectors that are used are read.

    Raises:
        BundleError: the file is not such a table.
    """
    try:
        return map_array(file, shape)
    except ValueError as error:
        raise BundleError(f"cannot read the embeddings: {error}; copy or export the bundle again") from error
