"""One answer, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hivtp.runtime.attempt import request_errors
from hivtp.runtime.generation import Generation, pieces_of, scheduler_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.model import Model
    from hivtp.runtime.prepared_prompt import PreparedPrompt
    from hivtp.runtime.vision.encoder import EncodedImage


class AnswerStream:
    """The pieces of one answer, as they come. One thread at a time uses it.

    Args:
        model: answers.
        prompt: what is asked.
        decode: from the request to the pieces of its answer; None decodes it in a scheduler of its own.
    """

    def __init__(
        self, model: Model, prompt: PreparedPrompt, decode: Callable[[Generation], Iterator[str]] | None = None
    ) -> None:
        self._result = _Result()
        self._pieces = _run(model, prompt, decode, self._result)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Give the answer up, and its memory back; an exhausted stream stays as it is."""
        self._pieces.close()

    @property
    def images(self) -> list[EncodedImage]:
        """What the language model sees of each image; empty until the first piece was asked for."""
        return self._result.images

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: the stream is not exhausted.
        """
        if self._result.answer is None:
            raise RuntimeError("the answer is complete when the stream is exhausted; iterate it first")
        return self._result.answer


@dataclass
class _Result:
    """What a stream has come to; apart from it, so that the memory of one that is dropped is free at once."""

    images: list[EncodedImage] = field(default_factory=list)
    answer: Answer | None = None


def _run(
    model: Model,
    prompt: PreparedPrompt,
    decode: Callable[[Generation], Iterator[str]] | None,
    result: _Result,
) -> Generator[str]:
    encoded = model.encode(prompt)
    result.images = encoded.new_images
    # The pixels have done their part.
    del prompt
    with request_errors():
        generation = Generation(model, encoded)
    if decode is None:
        yield from pieces_of(scheduler_for(model, [generation]), generation)
    else:
        yield from decode(generation)
    result.answer = generation.answer()
