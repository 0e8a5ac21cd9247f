"""How likely a model finds a continuation of a prompt that somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.attempt import attempt
from hivtp.runtime.generation import Generation, decode_together
from hivtp.runtime.inputs.messages import check_text
from hivtp.runtime.language.remote import RemoteBackend
from hivtp.runtime.language.sampling import SamplingParams, token_logprobs
from hivtp.runtime.request import Request
from hivtp_ops.errors import HivtpError, PromptError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.model import Model
    from hivtp.runtime.prepared_prompt import EncodedPrompt


@dataclass(frozen=True)
class Continuation:
    """A text whose likelihood is asked for.

    Args:
        prompt: what it answers; see `Pipeline.stream` for this and the images.
        images: of the prompt.
        text: comes right after the opening of the answer; begin it with a space where a word begins there.
    """

    prompt: str
    images: Sequence[ImageSource]
    text: str


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a continuation.

    Attributes:
        log_probabilities: the natural logarithm of each token's probability, given all before it.
        is_greedy: whether greedy decoding would write exactly these tokens.
    """

    log_probabilities: tuple[float, ...]
    is_greedy: bool


def likelihoods(model: Model, continuations: Sequence[Continuation]) -> list[Likelihood | HivtpError]:
    """The likelihoods of continuations, in joint steps of the decoder.

    Returns:
        For each the likelihood, or the error that it alone failed with: what `Pipeline.stream` raises, or a
        PromptError where the continuation has no tokens or does not fit the context.
    """
    readers = [attempt(_open_reader, model, continuation) for continuation in continuations]
    decode_together(model, [reader for reader in readers if not isinstance(reader, HivtpError)])
    return [reader if isinstance(reader, HivtpError) else attempt(reader.likelihood) for reader in readers]


def _open_reader(model: Model, continuation: Continuation) -> _Reader:
    if isinstance(model.language, RemoteBackend):
        raise SettingsError("likelihoods want the logits of a decoder that runs here; choose another language backend")
    request = Request(continuation.prompt, continuation.images)
    if not isinstance(continuation.text, str):
        raise PromptError(f"a continuation must be a str, not a {type(continuation.text).__name__}")
    check_text(continuation.text)
    prepared = model.prepare(request)
    template, tokenizer = model.template, model.tokenizer
    text = template.render(request.messages, tokenizer) + template.escape(continuation.text, tokenizer)
    token_ids = template.encode(tokenizer, text, model.manifest.image_token_id)
    # A tokenizer may join the last letters of the prompt with the first ones that follow.
    pairs = zip(prepared.token_ids, token_ids, strict=False)
    num_shared = next((place for place, (old, new) in enumerate(pairs) if old != new), len(prepared.token_ids))
    if num_shared >= len(token_ids):
        raise PromptError(f"the continuation {continuation.text!r} has no tokens; give text to judge")
    encoded = model.encode(replace(prepared, token_ids=token_ids[:num_shared]))
    return _Reader(model, encoded, token_ids[num_shared:])


class _Reader(Generation):
    """Reads a continuation token by token, and notes what the model thought of each."""

    def __init__(self, model: Model, prompt: EncodedPrompt, forced: list[int]) -> None:
        sampling = SamplingParams(max_new_tokens=len(forced), ignores_eos=True).resolved(model.manifest.sampling)
        super().__init__(model, replace(prompt, sampling=sampling))
        self._forced = forced
        self._log_probabilities: list[float] = []
        self._is_greedy = True

    def choose(self, logits: NDArray[np.float32]) -> int:
        """See DecodeRequest.choose."""
        token_id = self._forced[len(self._log_probabilities)]
        self._log_probabilities.append(token_logprobs(logits, token_id, 0).logprob)
        self._is_greedy &= int(np.argmax(logits)) == token_id
        return token_id

    def likelihood(self) -> Likelihood:
        """What was found.

        Raises:
            HivtpError: what the request failed with.
            PromptError: the context ended before the continuation did.
        """
        self.finish()
        num_read = len(self._log_probabilities)
        if num_read < len(self._forced):
            raise PromptError(
                f"{num_read} of the continuation's {len(self._forced)} tokens were read: the context is full; shorten "
                "it or the prompt"
            )
        return Likelihood(tuple(self._log_probabilities), self._is_greedy)
