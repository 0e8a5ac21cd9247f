"""One answer while its tokens come: collected, and given out piece by piece."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.answer import Answer, Timings
from hivtp.runtime.outcome import memory_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from hivtp.runtime.image_encoder import EncodedImage
    from hivtp.runtime.pipeline import Pipeline, PreparedPrompt


class AnswerStream:
    """The pieces of one answer, as they come; made by `Pipeline.stream`. One thread at a time uses it.

    Args:
        pipeline: answers.
        prompt: what is asked.
        decode: from what the language model sees of the prompt's images to the tokens of the answer.

    Attributes:
        images: what the language model sees of each image; empty until the first piece was asked for.
    """

    def __init__(
        self, pipeline: Pipeline, prompt: PreparedPrompt, decode: Callable[[list[EncodedImage]], Iterator[int]]
    ) -> None:
        self.images: list[EncodedImage] = []
        self._answer: Answer | None = None
        self._pieces = self._run(pipeline, prompt, decode)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with memory_errors():
            return next(self._pieces)

    def close(self) -> None:
        """Give the answer up, and its memory back; an exhausted stream stays as it is."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: the stream is not exhausted.
        """
        if self._answer is None:
            raise RuntimeError("the answer is complete when the stream is exhausted; iterate it first")
        return self._answer

    def _run(
        self, pipeline: Pipeline, prompt: PreparedPrompt, decode: Callable[[list[EncodedImage]], Iterator[int]]
    ) -> Generator[str]:
        started = time.perf_counter()
        self.images = pipeline.images.encode(prompt.images)
        builder = AnswerBuilder(pipeline, prompt.preprocess_ms, self.images, milliseconds_since(started))

        started = time.perf_counter()
        for token_id in decode(self.images):
            if piece := builder.push(token_id, milliseconds_since(started)):
                yield piece
            # The time that the caller takes with a piece is not the decoder's.
            started = time.perf_counter()
        if piece := builder.finish():
            yield piece
        self._answer = builder.build()


class AnswerBuilder:
    """Collects the tokens of one answer.

    Args:
        pipeline: what the tokens come from.
        preprocess_ms: see Timings.
        images: what the language model sees of the request's images.
        vision_ms: see Timings.
    """

    def __init__(
        self, pipeline: Pipeline, preprocess_ms: float, images: Sequence[EncodedImage], vision_ms: float
    ) -> None:
        self._language = pipeline.language
        self._text = pipeline.tokenizer.stream()
        self._preprocess_ms = preprocess_ms
        self._images = images
        self._vision_ms = vision_ms
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._step_ms: list[float] = []

    def push(self, token_id: int, step_ms: float) -> str:
        """Add a token and the time of its step; returns the text that has become certain."""
        self._token_ids.append(token_id)
        self._step_ms.append(step_ms)
        piece = self._text.push(token_id)
        self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """Return the text that still waited, after the last token."""
        piece = self._text.finish()
        self._pieces.append(piece)
        return piece

    def build(self) -> Answer:
        """The answer, once it is finished."""
        prefill_ms, *decode_ms = self._step_ms
        return Answer(
            text="".join(self._pieces),
            token_ids=self._token_ids,
            num_image_tokens=sum(image.num_unpruned_tokens for image in self._images),
            num_kept_tokens=sum(len(image.embeds) for image in self._images),
            kept_indices=[tile.kept_indices.tolist() for image in self._images for tile in image.tiles],
            finish_reason="stop" if self._language.is_end(self._token_ids[-1]) else "length",
            timings=Timings(
                preprocess_ms=self._preprocess_ms,
                vision_ms=self._vision_ms,
                prefill_ms=prefill_ms,
                ttft_ms=self._preprocess_ms + self._vision_ms + prefill_ms,
                decode_ms_per_token=float(np.mean(decode_ms)) if decode_ms else None,
            ),
        )


def milliseconds_since(started: float) -> float:
    """From a reading of `time.perf_counter` to now."""
    return (time.perf_counter() - started) * 1e3
