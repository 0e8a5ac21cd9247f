"""How likely a model finds a continuation of a prompt that somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.images import ImageSource
    from hivtp.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Continuation:
    """A text to be judged.

    Args:
        prompt: what it answers; see `Pipeline.stream` for this and the images.
        images: of the prompt.
        text: comes right behind the opening of the answer; begin it with a space where a word begins there.
    """

    prompt: str
    images: Sequence[ImageSource]
    text: str


@dataclass(frozen=True)
class Likelihood:
    """What the model finds of a continuation.

    Attributes:
        log_probabilities: the natural logarithm of each token's probability, given all before it.
        is_greedy: whether greedy decoding would write exactly these tokens.
    """

    log_probabilities: tuple[float, ...]
    is_greedy: bool


def likelihoods(pipeline: Pipeline, continuations: Sequence[Continuation]) -> list[Likelihood | HivtpError]:
    """Judge continuations together, in joint steps of the decoder.

    Returns:
        For each the likelihood, or the error that it alone failed with: what `Pipeline.stream` raises, or a
        PromptError where the continuation has no tokens or does not fit the context.
    """
    readers: dict[int, _Reader] = {}
    errors: dict[int, HivtpError] = {}
    for index, continuation in enumerate(continuations):
        outcome = attempt(_read, pipeline, continuation)
        if isinstance(outcome, HivtpError):
            errors[index] = outcome
        else:
            readers[index] = outcome
    order = list(readers)
    for step in pipeline.language.generate_batch([readers[index].request() for index in order]):
        errors |= {order[row]: outcome for row, outcome in step.items() if isinstance(outcome, HivtpError)}
    return [
        errors[index] if index in errors else attempt(readers[index].likelihood) for index in range(len(continuations))
    ]


def _read(pipeline: Pipeline, continuation: Continuation) -> _Reader:
    prepared = pipeline.prepare(continuation.prompt, continuation.images)
    text = pipeline.template.render(continuation.prompt, len(continuation.images)) + continuation.text
    token_ids = pipeline.template.encode(pipeline.tokenizer, text, pipeline.image_token_id)
    # A tokenizer may join the last letters of the prompt with the first ones that follow.
    pairs = zip(prepared.token_ids, token_ids, strict=False)
    num_shared = next((place for place, (old, new) in enumerate(pairs) if old != new), len(prepared.token_ids))
    if num_shared >= len(token_ids):
        raise PromptError(f"the continuation {continuation.text!r} has no tokens; give text to judge")
    images = pipeline.images.encode(prepared.images)
    embeds = pipeline.embed(replace(prepared, token_ids=token_ids[:num_shared]), images)
    return _Reader(embeds, token_ids[num_shared:])


class _Reader:
    """Reads a continuation token by token, and notes what the model thought of each."""

    def __init__(self, embeds: NDArray[np.float32], token_ids: list[int]) -> None:
        self._embeds = embeds
        self._token_ids = token_ids
        self._log_probabilities: list[float] = []
        self._is_greedy = True

    def request(self) -> DecodeRequest:
        return DecodeRequest(self._embeds, len(self._token_ids), self._choose)

    def likelihood(self) -> Likelihood:
        if len(self._log_probabilities) < len(self._token_ids):
            raise PromptError(
                f"{len(self._log_probabilities)} of the continuation's {len(self._token_ids)} tokens were read: an "
                "end-of-sequence token stands in it, or the context is full; shorten it or the prompt"
            )
        return Likelihood(tuple(self._log_probabilities), self._is_greedy)

    def _choose(self, logits: NDArray[np.float32]) -> int:
        token_id = self._token_ids[len(self._log_probabilities)]
        shifted = logits.astype(np.float64) - logits.max()
        self._log_probabilities.append(float(shifted[token_id] - np.log(np.exp(shifted).sum())))
        self._is_greedy &= int(logits.argmax()) == token_id
        return token_id
