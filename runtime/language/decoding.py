"""The loops over a decoder, which are the same in every backend: one sequence, and several together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hivtp.runtime.language.base import SequenceCache
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.language.base import ChooseToken, DecodeRequest, LanguageBackend


class DecoderSequence(SequenceCache, Protocol):
    """One sequence in a decoder. A run that fails leaves it as it was."""

    def append(self, embeds: Embeddings) -> NDArray[np.float32]:
        """Run the decoder on [num, hidden] new positions; the logits [vocab] of the last, valid until the next call."""


class DecoderBatch(Protocol):
    """Sequences in a decoder, each in a slot; those in use are the first ones."""

    def append(self, slot: int, embeds: Embeddings) -> NDArray[np.float32]:
        """Begin the sequence of the first free slot with [num, hidden] positions; the logits [vocab] of the last."""

    def step(self, embeds: Embeddings) -> Sequence[NDArray[np.float32] | HivtpError]:
        """Run one position [slots, hidden] of each sequence; the logits [vocab] of each, or why it failed."""

    def drop(self, slot: int, last: int) -> None:
        """Give the slot to the sequence of the last slot in use, and free that."""


def decode(
    language: LanguageBackend,
    sequence: DecoderSequence,
    inputs_embeds: Embeddings,
    num_tokens: int,
    choose_token: ChooseToken,
) -> Iterator[int]:
    """Decode one sequence; see LanguageBackend.generate.

    Args:
        language: the backend.
        sequence: what comes before `inputs_embeds`.
        inputs_embeds: [length, hidden] as the backend's `embed` gives them.
        num_tokens: the most tokens that the context has room for.
        choose_token: picks a token from the logits.
    """
    logits = sequence.append(inputs_embeds)
    for step in range(num_tokens):
        token_id = choose_token(logits)
        yield token_id
        if language.is_end(token_id):
            return
        if step + 1 < num_tokens:
            logits = sequence.append(language.embed([token_id]))


def decode_batch(
    language: LanguageBackend, batch: DecoderBatch, requests: Sequence[DecodeRequest]
) -> Iterator[dict[int, int | HivtpError]]:
    """Decode several sequences together; see LanguageBackend.generate_batch.

    Args:
        language: the backend.
        batch: no slot of it is in use.
        requests: at least one.
    """
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        slot = len(rows)
        row = _Row(index, request, num_new_tokens(language, request))
        outcome = row.choose(attempt(batch.append, slot, request.inputs_embeds))
        if row.goes_on(language, outcome):
            rows.append(row)
        else:
            batch.drop(slot, last=slot)
        yield {index: outcome}
    while rows:
        logits = batch.step(language.embed([row.token_id for row in rows]))
        outcomes = [row.choose(row_logits) for row, row_logits in zip(rows, logits, strict=True)]
        yield {row.index: outcome for row, outcome in zip(rows, outcomes, strict=True)}
        # From the last, so that the row that takes a free slot is one that goes on.
        for slot in reversed(range(len(rows))):
            if not rows[slot].goes_on(language, outcomes[slot]):
                batch.drop(slot, last=len(rows) - 1)
                rows[slot] = rows[-1]
                rows.pop()


def decode_batch_or_halves(
    language: LanguageBackend, requests: Sequence[DecodeRequest], open_batch: Callable[[], DecoderBatch]
) -> Iterator[dict[int, int | HivtpError]]:
    """Decode sequences together; where there is no memory for all at once, the halves one after the other.

    Args:
        language: the backend.
        requests: at least one; one that is alone gets the error.
        open_batch: makes a batch with room for all of them.
    """
    batch = attempt(open_batch)
    if not isinstance(batch, HivtpError):
        yield from decode_batch(language, batch, requests)
        return
    if len(requests) == 1:
        yield {0: batch}
        return
    middle = len(requests) // 2
    for start, half in ((0, requests[:middle]), (middle, requests[middle:])):
        for step in language.generate_batch(half):
            yield {start + index: outcome for index, outcome in step.items()}


def num_new_tokens(language: LanguageBackend, request: DecodeRequest) -> int:
    """The most tokens that a request can get."""
    return min(request.max_new_tokens, language.context_length - len(request.inputs_embeds))


@dataclass
class _Row:
    """One sequence of a batch: which request it answers, the tokens that it may still get, and its last one."""

    index: int
    request: DecodeRequest
    num_left: int
    token_id: int = -1

    def choose(self, logits: NDArray[np.float32] | HivtpError) -> int | HivtpError:
        """Take the next token from logits, or pass on why there are none."""
        outcome = logits if isinstance(logits, HivtpError) else attempt(self.request.choose_token, logits)
        if not isinstance(outcome, HivtpError):
            self.token_id = outcome
            self.num_left -= 1
        return outcome

    def goes_on(self, language: LanguageBackend, outcome: int | HivtpError) -> bool:
        """Whether it gets another token after this outcome."""
        return not isinstance(outcome, HivtpError) and not language.is_end(outcome) and self.num_left > 0
