"""Several requests answered together, in which one that fails loses no other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from hivtp.runtime.answer_stream import AnswerBuilder, milliseconds_since
from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.outcome import attempt
from hivtp.runtime.request import Request
from hivtp.runtime.sampling import Sampler
from hivtp_ops.errors import HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.image_encoder import EncodedImage
    from hivtp.runtime.pipeline import Pipeline, PreparedPrompt

T = TypeVar("T")


def answer_batch(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer | HivtpError]:
    """Answer requests together; see `Pipeline.generate_batch`."""
    errors: dict[int, HivtpError] = {}
    prompts = _sift({index: attempt(_prepare, pipeline, item) for index, item in enumerate(requests)}, errors)

    started = time.perf_counter()
    images = _sift(_encode(pipeline, prompts), errors)
    vision_ms = milliseconds_since(started)

    embeds = _sift(
        {index: attempt(pipeline.embed, prompts[index], encoded) for index, encoded in images.items()}, errors
    )
    builders = {
        index: AnswerBuilder(pipeline, prompts[index].preprocess_ms, images[index], vision_ms) for index in embeds
    }
    # The pixels have done their part, and those of a large batch are many.
    del prompts
    order = list(embeds)
    batch = [
        DecodeRequest(embeds[index], requests[index].max_new_tokens, Sampler(requests[index].sampling))
        for index in order
    ]
    started = time.perf_counter()
    for step in pipeline.language.generate_batch(batch):
        step_ms = milliseconds_since(started)
        tokens = _sift({order[row]: outcome for row, outcome in step.items()}, errors)
        for index, token_id in tokens.items():
            builders[index].push(token_id, step_ms)
        started = time.perf_counter()
    return [errors[index] if index in errors else _finish(builders[index]) for index in range(len(requests))]


def _prepare(pipeline: Pipeline, request: Request) -> PreparedPrompt:
    if not isinstance(request, Request):
        raise PromptError(f"a batch holds a Request for each answer, not a {type(request).__name__}")
    return pipeline.prepare(request.prompt, request.images)


def _encode(pipeline: Pipeline, prompts: Mapping[int, PreparedPrompt]) -> Mapping[int, list[EncodedImage] | HivtpError]:
    """The images of all prompts in one batch, or prompt by prompt where that fails."""
    together = attempt(pipeline.images.encode, [image for prompt in prompts.values() for image in prompt.images])
    if isinstance(together, HivtpError):
        return {index: attempt(pipeline.images.encode, prompt.images) for index, prompt in prompts.items()}
    encoded = iter(together)
    return {index: [next(encoded) for _ in prompt.images] for index, prompt in prompts.items()}


def _sift(outcomes: Mapping[int, T | HivtpError], errors: dict[int, HivtpError]) -> dict[int, T]:
    """Move the errors among outcomes to `errors`; returns the others."""
    good: dict[int, T] = {}
    for index, outcome in outcomes.items():
        if isinstance(outcome, HivtpError):
            errors[index] = outcome
        else:
            good[index] = outcome
    return good


def _finish(builder: AnswerBuilder) -> Answer:
    builder.finish()
    return builder.build()
