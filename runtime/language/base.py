"""What every language backend offers: embeddings in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.base import Device
    from hivtp.runtime.device_rows import Embeddings
    from hivtp_ops.errors import HivtpError

# From the logits [vocab] float32 of one position to a token id.
ChooseToken = Callable[[NDArray[np.float32]], int]


class SequenceCache(Protocol):
    """The keys and values of one sequence, kept between calls of `LanguageBackend.generate`."""

    @property
    def length(self) -> int:
        """Positions that it holds."""

    def cut(self, length: int) -> None:
        """Forget all but the first positions; `length` is at most what it holds."""


@dataclass(frozen=True)
class DecodeRequest:
    """One sequence of a batch: the arguments of `LanguageBackend.generate`.

    Args:
        inputs_embeds: [length, hidden], 0 < length < context_length, of the kind that the backend's `embed` gives.
        max_new_tokens: at least 1.
        choose_token: picks a token from the logits.
    """

    inputs_embeds: Embeddings
    max_new_tokens: int
    choose_token: ChooseToken


class LanguageBackend(Protocol):
    """A decoder and its token embeddings. It knows nothing of images. Several threads may use it at once."""

    context_length: int

    @property
    def rows_device(self) -> Device | None:
        """The device whose memory it takes embeddings from, as DeviceRows; None where it takes arrays alone."""

    def embed(self, token_ids: Sequence[int]) -> Embeddings:
        """Look up token embeddings: [num_tokens, hidden], a float32 array, or DeviceRows where it takes them."""

    def new_cache(self) -> SequenceCache:
        """An empty cache for `generate` of this backend. One thread at a time uses it."""

    def generate(
        self,
        inputs_embeds: Embeddings,
        max_new_tokens: int,
        choose_token: ChooseToken,
        cache: SequenceCache | None = None,
    ) -> Iterator[int]:
        """Decode one sequence, yielding each token id as soon as it is known.

        The first step of the iterator is the prefill. It ends after an end-of-sequence token, which it
        yields, or after `max_new_tokens`, or where the context is full.

        Args:
            inputs_embeds: [length, hidden] as `embed` gives them, 0 < length < context_length.
            max_new_tokens: at least 1.
            choose_token: picks a token from the logits.
            cache: what comes before `inputs_embeds`; the context must hold both. It grows by every position
                that was computed: `inputs_embeds`, and each token but the last. None is an empty one.

        Raises:
            EngineError: the engine failed.
        """

    def generate_batch(self, requests: Sequence[DecodeRequest]) -> Iterator[dict[int, int | HivtpError]]:
        """Decode several sequences together, each to the tokens that `generate` gives for it alone.

        Yields one dict per run of the decoder, from the index of a request to its next token. The prefills come
        first, one run per request, in order; then each run is a step of all sequences that have not ended. A
        request that fails gets its error (an EngineError, an OutOfMemoryError, or what its `choose_token`
        raised) in place of a token, and leaves the batch; nothing is raised.
        """

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends an answer."""


def embedding_table(file: Path, shape: tuple[int, int]) -> NDArray[np.floating]:
    """Map a table [vocab, hidden] of floats into memory; only the rows that are used are read.

    Raises:
        BundleError: the file is no such table.
    """
    try:
        table: NDArray[np.floating] = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise BundleError(f"cannot read the embeddings {file}: {error}; copy or export the bundle again") from error
    if table.shape != shape or not np.issubdtype(table.dtype, np.floating):
        raise BundleError(
            f"the embeddings {file} are {table.dtype} of shape {list(table.shape)}, the manifest says floats of shape "
            f"{list(shape)}; copy or export the bundle again"
        )
    return table
