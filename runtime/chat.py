"""A conversation: what was said stays in the KV cache, so a further question costs its own tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.answer_stream import AnswerStream
from hivtp.runtime.generation import pieces_of, scheduler_for
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.generation import Generation
    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.language.remote import RequestScheduler
    from hivtp.runtime.model import Model
    from hivtp.runtime.vision.encoder import EncodedImage


class Chat:
    """The turns of one conversation; made by `Pipeline.chat`. One thread at a time uses it.

    Each answer is the one to the whole conversation, written with the model's chat template. Only what the KV
    cache does not hold yet is computed: earlier turns and their images cost neither vision nor prefill. Where a bundle
    has a prefill decoder, the cache holds what the two decoders wrote, prompts and answers in turn; asked afresh,
    the prefill decoder would run all of it, and round a little differently.

    Args:
        model: answers.
        system: what the model is told before the conversation.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._history: list[Message] = []
        self._scheduler: RequestScheduler | None = None
        # The turn that is being answered, and how many have begun.
        self._current: Generation | None = None
        self._num_begun = 0

    @property
    def history(self) -> tuple[Message, ...]:
        """The turns that were answered to their end: a message of the user and one of the assistant for each."""
        return tuple(self._history)

    def ask(self, prompt: str, images: Sequence[ImageSource] = (), sampling: SamplingParams | None = None) -> Answer:
        """Answer the next turn; see `stream`."""
        stream = self.stream(prompt, images, sampling)
        for _piece in stream:
            pass
        return stream.answer

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), sampling: SamplingParams | None = None
    ) -> AnswerStream:
        """Answer the next turn piece by piece; the arguments and errors are those of `Pipeline.stream`.

        The turn belongs to the conversation when it is answered to its end: one that fails, or whose stream is
        abandoned, leaves none. The counts of the answer are of this turn's images; with LLaVA-OneVision, which cuts an
        image otherwise where another joins it, of all images of the conversation.

        Raises:
            PromptError: as in `Pipeline.stream`, or the conversation no longer fits the context.
            RuntimeError: from the stream, when a newer turn has begun before it ended.
        """
        sampling = SamplingParams() if sampling is None else sampling
        request = Request(prompt, images, sampling, self._system, tuple(self._history))
        prepared = self._model.prepare(request)
        message = request.message
        # From here on this turn is the newest one, and an older one that was not finished is given up.
        self._give_up()
        self._num_begun += 1
        number = self._num_begun

        def decode(generation: Generation) -> Iterator[str]:
            self._check_is_newest(number)
            for piece in pieces_of(self._scheduler_for(generation), generation):
                yield piece
                self._check_is_newest(number)
            answer = Message("assistant", [generation.answer().text])
            is_final = not self._model.bundle.manifest.cuts_single_images
            self._history += [_with_encoded(message, generation.prompt.new_images) if is_final else message, answer]

        return AnswerStream(self._model, prepared, decode)

    def _scheduler_for(self, generation: Generation) -> RequestScheduler:
        if self._scheduler is None:
            self._scheduler = scheduler_for(self._model, [generation], keeps_slots=True)
        self._current = generation
        return self._scheduler

    def _give_up(self) -> None:
        if self._scheduler is not None and self._current is not None:
            self._scheduler.cancel(self._current)
        self._current = None

    def _check_is_newest(self, number: int) -> None:
        if number != self._num_begun:
            raise RuntimeError("a newer turn of this chat has begun; finish a stream before the next question")


def _with_encoded(message: Message, images: Sequence[EncodedImage]) -> Message:
    """A message whose images are encoded already, so that later turns need not read them again."""
    encoded = iter(images)
    parts = [part if isinstance(part, str) else ImagePart(next(encoded)) for part in message.parts]
    return Message(message.role, parts, message.keeps_places)
