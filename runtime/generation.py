"""One request while it is answered: its tokens collected into text, and given out piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.answer import Answer, Timings
from hivtp.runtime.attempt import attempt, request_errors
from hivtp.runtime.inputs.stop_strings import StopStrings
from hivtp.runtime.language import open_scheduler
from hivtp.runtime.language.remote import Turn
from hivtp.runtime.language.sampler import Sampler
from hivtp.runtime.language.sampling import TokenLogprobs, token_logprobs
from hivtp.runtime.language.scheduler import SchedulerOptions
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.language.remote import RequestScheduler
    from hivtp.runtime.language.sampling import SamplingParams
    from hivtp.runtime.model import EncodedPrompt, Model


class Generation:
    """The answer to one request as it grows; what a scheduler decodes.

    Args:
        model: what the request is put to.
        prompt: the request, its images encoded.

    Attributes:
        prompt: as given.
        num_prompt_tokens: positions of the prompt, those of its images included.
        embeds: see DecodeRequest; released at the first token.
        sampling: how tokens are chosen.
        error: what the request failed with; None while it did not.
        num_cached: positions of the prompt that another request had left in the KV cache.
    """

    def __init__(self, model: Model, prompt: EncodedPrompt) -> None:
        self.prompt = prompt
        self.num_prompt_tokens = model.length(prompt)
        self.embeds: NDArray[np.float32] = model.embed(prompt)
        self.sampling: SamplingParams = prompt.sampling
        self.error: HivtpError | None = None
        self.num_cached = 0
        self._keys = model.keys(prompt)
        self._eos_token_ids = frozenset(() if prompt.sampling.ignores_eos else model.eos_token_ids)
        self._sampler = Sampler(prompt.sampling, prompt.token_ids)
        self._text = model.tokenizer.stream()
        self._stops = StopStrings(prompt.sampling.stop)
        self._new_token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._pieces: list[str] = []
        self._num_given = 0
        self._step_ms: list[float] = []
        self._ran = model.ran
        self._is_finished = False

    @property
    def max_new_tokens(self) -> int:
        """See DecodeRequest.max_new_tokens."""
        return self.sampling.max_new_tokens

    @property
    def keys(self) -> Sequence[Hashable] | None:
        """See DecodeRequest.keys."""
        return self._keys

    @property
    def turns(self) -> list[Turn]:
        """See RemoteRequest.turns."""
        images = iter(self.prompt.images)
        return [
            Turn(message.role, tuple(part if isinstance(part, str) else next(images).embeds for part in message.parts))
            for message in self.prompt.messages
        ]

    @property
    def token_ids(self) -> Sequence[int]:
        """See RemoteRequest.token_ids."""
        return self.prompt.token_ids

    @property
    def salt(self) -> str | None:
        """See RemoteRequest.salt."""
        return None

    @property
    def has_begun(self) -> bool:
        """Whether there is a first token."""
        return bool(self._new_token_ids)

    def begin(self, num_cached: int) -> None:
        """See DecodeRequest.begin."""
        self.num_cached = num_cached

    def choose(self, logits: NDArray[np.float32]) -> int:
        """See DecodeRequest.choose."""
        token_id = self._sampler(logits)
        if self.sampling.logprobs is not None:
            self.note_logprobs(token_logprobs(logits, token_id, self.sampling.logprobs))
        return token_id

    def note_logprobs(self, logprobs: TokenLogprobs) -> None:
        """See RemoteRequest.note_logprobs."""
        self._logprobs.append(logprobs)

    def push(self, token_id: int, milliseconds: float) -> bool:
        """See DecodeRequest.push."""
        if not self._new_token_ids:
            self._release()
        self._new_token_ids.append(token_id)
        self._step_ms.append(milliseconds)
        self._pieces.append(self._stops.push(self._text.push(token_id)))
        return self._stops.found is None and token_id not in self._eos_token_ids

    def fail(self, error: HivtpError) -> None:
        """See DecodeRequest.fail."""
        self.error = error
        self._release()

    def take_pieces(self) -> Iterator[str]:
        """The text that has become certain since the last call."""
        pieces = self._pieces[self._num_given :]
        self._num_given += len(pieces)
        return (piece for piece in pieces if piece)

    def finish(self) -> None:
        """Settle the text that still waited; the scheduler has ended the sequence.

        Raises:
            HivtpError: what the request failed with.
        """
        if self.error is not None:
            raise self.error
        if not self._is_finished:
            self._is_finished = True
            if self._stops.found is None:
                with request_errors():
                    self._pieces.append(self._stops.push(self._text.finish()) + self._stops.finish())

    def answer(self) -> Answer:
        """The whole answer, once it is finished."""
        assert self._is_finished, "an answer is whole when it is finished"
        prefill_ms, *decode_ms = self._step_ms
        prompt, images = self.prompt, self.prompt.new_images
        has_stopped = self._stops.found is not None or self._new_token_ids[-1] in self._eos_token_ids
        return Answer(
            text="".join(self._pieces),
            token_ids=self._new_token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_image_tokens=sum(image.num_unpruned_tokens for image in images),
            num_kept_tokens=sum(len(image.embeds) for image in images),
            kept_indices=[tile.kept_indices.tolist() for image in images for tile in image.tiles],
            finish_reason="stop" if has_stopped else "length",
            stop=self._stops.found,
            logprobs=None if self.sampling.logprobs is None else self._logprobs,
            timings=Timings(
                preprocess_ms=prompt.preprocess_ms,
                vision_ms=prompt.vision_ms,
                prefill_ms=prefill_ms,
                ttft_ms=prompt.preprocess_ms + prompt.vision_ms + prefill_ms,
                decode_ms_per_token=float(np.mean(decode_ms)) if decode_ms else None,
            ),
            ran=self._ran,
        )

    def _release(self) -> None:
        # The KV cache holds the prompt by now, and the embeddings of a large batch are many.
        self.embeds = np.empty((0, 0), np.float32)


def steps_of(scheduler: RequestScheduler, generation: Generation) -> Iterator[None]:
    """Decode one request, run by run; whoever stops iterating gives the request up.

    Raises:
        HivtpError: what the request failed with.
    """
    scheduler.add(generation)
    try:
        has_more = True
        while has_more:
            has_more = scheduler.step()
            yield
        generation.finish()
    finally:
        scheduler.cancel(generation)


def pieces_of(scheduler: RequestScheduler, generation: Generation) -> Iterator[str]:
    """Decode one request, and give out its text as it comes.

    Raises:
        HivtpError: what the request failed with.
    """
    for _ in steps_of(scheduler, generation):
        yield from generation.take_pieces()
    yield from generation.take_pieces()


def scheduler_for(model: Model, generations: Sequence[Generation], *, keeps_slots: bool = False) -> RequestScheduler:
    """A scheduler with a slot for each of some requests, and memory for no more.

    Args:
        model: decodes.
        generations: at least one.
        keeps_slots: for a conversation, whose next turn begins with this one, and takes more room.

    Raises:
        EngineError: the pipeline is closed.
        OutOfMemoryError: there is no memory for all of them at once.
    """
    capacity = max(generation.num_prompt_tokens + generation.max_new_tokens for generation in generations)
    options = SchedulerOptions(
        num_slots=len(generations), capacity=max(2, capacity), grows=keeps_slots, keeps_slots=keeps_slots
    )
    with request_errors():
        return open_scheduler(model.language, options)


def decode_together(model: Model, generations: Sequence[Generation]) -> None:
    """Decode requests together; where there is no memory for all at once, the halves one after the other.

    Args:
        model: decodes.
        generations: each holds its error, or is ready to be finished, when this returns.
    """
    if not generations:
        return
    scheduler = attempt(scheduler_for, model, generations)
    if not isinstance(scheduler, HivtpError):
        for generation in generations:
            scheduler.add(generation)
        scheduler.run()
    elif len(generations) == 1:
        generations[0].fail(scheduler)
    else:
        middle = len(generations) // 2
        decode_together(model, generations[:middle])
        decode_together(model, generations[middle:])


def finished(generation: Generation) -> Answer:
    """The answer of a request whose decoding has ended.

    Raises:
        HivtpError: what the request failed with.
    """
    generation.finish()
    return generation.answer()
