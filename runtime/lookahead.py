"""Requests answered one after the other, in which the pictures of the next one are prepared meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hivtp.runtime.answer_stream import AnswerBuilder, milliseconds_since
from hivtp.runtime.outcome import attempt
from hivtp.runtime.request import Request
from hivtp.runtime.sampling import Sampler
from hivtp_ops.errors import HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.image_encoder import EncodedImage
    from hivtp.runtime.pipeline import Pipeline, PreparedPrompt


def answer_each(pipeline: Pipeline, requests: Iterable[Request]) -> Generator[Answer | HivtpError]:
    """Answer requests in order; see `Pipeline.generate_each`."""
    with ThreadPoolExecutor(1, "hivtp-lookahead") as thread:
        lookahead = Lookahead(pipeline, iter(requests), thread)
        while True:
            asked_at = time.perf_counter()
            coming = lookahead.take()
            if coming is None:
                return
            outcome = attempt(_answer, pipeline, coming, asked_at, lookahead.begin)
            # Nothing of it is held while the caller works with the answer.
            del coming
            # Where there was no first token, the next request has not begun yet.
            lookahead.begin()
            yield outcome


@dataclass(frozen=True)
class Taken:
    """A request that was taken from where requests come from.

    Attributes:
        request: what is asked.
        taken_at: when, as `time.perf_counter` reads.
        encoded: its prompt without the pixels, and its pictures; or why there are none.
    """

    request: Request
    taken_at: float
    encoded: EncodedPrompt | HivtpError


@dataclass(frozen=True)
class EncodedPrompt:
    """A checked prompt whose pictures went through the vision stage.

    Attributes:
        prompt: without pixels.
        images: what the language model sees of each picture.
        vision_ms: time of the vision stage.
    """

    prompt: PreparedPrompt
    images: list[EncodedImage]
    vision_ms: float


class Lookahead:
    """Takes the next request and prepares it in a thread, one at a time.

    Args:
        pipeline: prepares it.
        requests: where requests come from.
        thread: what it runs in, alone.
    """

    def __init__(self, pipeline: Pipeline, requests: Iterator[Request], thread: ThreadPoolExecutor) -> None:
        self._pipeline = pipeline
        self._requests = requests
        self._thread = thread
        self._coming: Future[Taken | None] | None = None

    def begin(self) -> Future[Taken | None]:
        """Begin to prepare the next request, unless that has begun."""
        if self._coming is None:
            self._coming = self._thread.submit(self._take_next)
        return self._coming

    def take(self) -> Taken | None:
        """Wait for the next request; None after the last one. It raises what iterating the requests raises."""
        coming = self.begin()
        self._coming = None
        return coming.result()

    def _take_next(self) -> Taken | None:
        for request in self._requests:
            return Taken(request, time.perf_counter(), attempt(_encode, self._pipeline, request))
        return None


def _encode(pipeline: Pipeline, request: Request) -> EncodedPrompt:
    if not isinstance(request, Request):
        raise PromptError(f"requests must hold a Request for each answer, not a {type(request).__name__}")
    prompt = pipeline.prepare(request.prompt, request.images)
    started = time.perf_counter()
    images = pipeline.images.encode(prompt.images)
    return EncodedPrompt(replace(prompt, images=[]), images, milliseconds_since(started))


def _answer(pipeline: Pipeline, taken: Taken, asked_at: float, at_first_token: Callable[[], object]) -> Answer:
    encoded = taken.encoded
    if isinstance(encoded, HivtpError):
        raise encoded
    builder = AnswerBuilder(pipeline, encoded.prompt.preprocess_ms, encoded.images, encoded.vision_ms)
    request, ttft_ms = taken.request, None
    started = time.perf_counter()
    embeds = pipeline.embed(encoded.prompt, encoded.images)
    for token_id in pipeline.language.generate(embeds, request.max_new_tokens, Sampler(request.sampling)):
        builder.push(token_id, milliseconds_since(started))
        if ttft_ms is None:
            ttft_ms = milliseconds_since(max(asked_at, taken.taken_at))
            at_first_token()
        started = time.perf_counter()
    builder.finish()
    answer = builder.build()
    assert ttft_ms is not None, "an answer has a token"
    return replace(answer, timings=replace(answer.timings, ttft_ms=ttft_ms))
