"""A conversation: what was said stays in the KV cache, so a further question costs its own tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from hivtp.runtime.answer_stream import AnswerStream
from hivtp.runtime.prompt import Turn
from hivtp.runtime.request import GenerationSettings, Request
from hivtp.runtime.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.image_encoder import EncodedImage
    from hivtp.runtime.images import ImageSource
    from hivtp.runtime.pipeline import Pipeline


class Chat:
    """The turns of one conversation; made by `Pipeline.chat`. One thread at a time uses it.

    Each answer is the one to the whole conversation, written with the model's chat template. Only what the KV
    cache does not hold yet is computed: earlier turns and their images cost neither vision nor prefill. Where a bundle
    has a decoder for prompts, the cache holds what the two decoders wrote, prompts and answers in turn; asked afresh,
    the one for prompts would run all of it, and round a little differently.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._turns: list[Turn] = []
        self._images: list[EncodedImage] = []
        self._cache = pipeline.language.new_cache()
        # What was last given to the decoder; the cache holds its first `length` positions.
        self._sequence: list[int | EncodedImage] = []
        self._num_streams = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns that were answered to their end."""
        return tuple(self._turns)

    def ask(self, prompt: str, images: Sequence[ImageSource] = (), **settings: Unpack[GenerationSettings]) -> Answer:
        """Answer the next turn; see `stream`."""
        stream = self.stream(prompt, images, **settings)
        for _piece in stream:
            pass
        return stream.answer

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), **settings: Unpack[GenerationSettings]
    ) -> AnswerStream:
        """Answer the next turn piece by piece; the arguments and errors are those of `Pipeline.stream`.

        The turn belongs to the conversation when it is answered to its end: one that fails, or whose stream is
        abandoned, leaves none. The counts of the answer are of this turn's images.

        Raises:
            PromptError: as in `Pipeline.stream`, or the conversation no longer fits the context.
            RuntimeError: from the stream, when a newer turn has begun before it ended.
        """
        request = Request(prompt, images, **settings)
        prepared = self._pipeline.prepare(prompt, images, self._turns)
        sampler = Sampler(request.sampling)
        self._num_streams += 1
        number = self._num_streams

        def decode(encoded: list[EncodedImage]) -> Iterator[int]:
            self._check_is_newest(number)
            all_images = self._images + encoded
            embeds = self._pipeline.embed(prepared, all_images)
            sequence = _with_images(prepared.token_ids, all_images, self._pipeline.image_token_id)
            # The last position gives the first logits, so it is always computed.
            num_shared = min(_num_common_positions(self._sequence, sequence), self._cache.length, len(embeds) - 1)
            self._cache.cut(num_shared)
            self._sequence = sequence
            answer_ids: list[int] = []
            for token_id in self._pipeline.language.generate(
                embeds[num_shared:], request.max_new_tokens, sampler, self._cache
            ):
                answer_ids.append(token_id)
                sequence.append(token_id)
                yield token_id
                self._check_is_newest(number)
            # An image token that the model spells out stands for no image.
            text = self._pipeline.tokenizer.decode(answer_ids).replace(self._pipeline.template.image_token, "")
            self._turns.append(Turn(prompt, len(images), text))
            self._images = all_images

        return AnswerStream(self._pipeline, prepared, decode)

    def _check_is_newest(self, number: int) -> None:
        if number != self._num_streams:
            raise RuntimeError("a newer turn of this chat has begun; finish a stream before the next question")


def _with_images(token_ids: list[int], images: list[EncodedImage], image_token_id: int) -> list[int | EncodedImage]:
    """Token ids with each image in place of its placeholder."""
    remaining = iter(images)
    return [next(remaining) if token_id == image_token_id else token_id for token_id in token_ids]


def _num_common_positions(first: list[int | EncodedImage], second: list[int | EncodedImage]) -> int:
    """The positions that two sequences have in common from their start; an image is equal to itself only."""
    num_positions = 0
    for one, other in zip(first, second, strict=False):
        if isinstance(one, int):
            if one != other:
                break
            num_positions += 1
        else:
            if one is not other:
                break
            num_positions += len(one.embeds)
    return num_positions
