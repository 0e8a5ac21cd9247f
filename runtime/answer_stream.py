"""One answer, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.attempt import memory_errors
from hivtp.runtime.generation import Generation, pieces_of, scheduler_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.model import Model, PreparedPrompt
    from hivtp.runtime.vision.encoder import EncodedImage


class AnswerStream:
    """The pieces of one answer, as they come. One thread at a time uses it.

    Args:
        model: answers.
        prompt: what is asked.
        decode: from the request to the pieces of its answer; None decodes it in a scheduler of its own.

    Attributes:
        images: what the language model sees of each image; empty until the first piece was asked for.
    """

    def __init__(
        self, model: Model, prompt: PreparedPrompt, decode: Callable[[Generation], Iterator[str]] | None = None
    ) -> None:
        self.images: list[EncodedImage] = []
        self._answer: Answer | None = None
        self._pieces = self._run(model, prompt, decode)

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
        self, model: Model, prompt: PreparedPrompt, decode: Callable[[Generation], Iterator[str]] | None
    ) -> Generator[str]:
        encoded = model.encode(prompt)
        self.images = encoded.new_images
        # The pixels have done their part.
        del prompt
        generation = Generation(model, encoded)
        if decode is None:
            yield from pieces_of(scheduler_for(model, [generation]), generation)
        else:
            yield from decode(generation)
        self._answer = generation.answer()
