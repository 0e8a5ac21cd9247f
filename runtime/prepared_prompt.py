"""A request on its way: checked and tokenised, then with its images encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivtp.runtime.vision.encoder import EncodedImage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.inputs.messages import Message
    from hivtp.runtime.inputs.prepared_image import PreparedImage
    from hivtp.runtime.language.sampling import SamplingParams


@dataclass(frozen=True)
class PreparedPrompt:
    """A checked request.

    Attributes:
        token_ids: of the whole conversation, one placeholder per image.
        messages: the conversation as the chat template takes it, images without their sources.
        images: in the order of the placeholders: pixels, or what an earlier turn has encoded.
        sampling: resolved.
        preprocess_ms: see Timings.
    """

    token_ids: list[int]
    messages: Sequence[Message]
    images: list[PreparedImage | EncodedImage]
    sampling: SamplingParams
    preprocess_ms: float

    @property
    def pixels(self) -> list[PreparedImage]:
        """The images that are still to be encoded."""
        return [image for image in self.images if not isinstance(image, EncodedImage)]

    def encoded(self, images: Sequence[EncodedImage], vision_ms: float) -> EncodedPrompt:
        """The same after the vision stage, with these in the place of `pixels`."""
        new = iter(images)
        both = [image if isinstance(image, EncodedImage) else next(new) for image in self.images]
        return EncodedPrompt(
            self.token_ids, self.messages, both, list(images), self.sampling, self.preprocess_ms, vision_ms
        )


@dataclass(frozen=True)
class EncodedPrompt:
    """A request whose images went through the vision stage.

    Attributes:
        token_ids, messages, sampling, preprocess_ms: see PreparedPrompt.
        images: one for each placeholder.
        new_images: those of them that this request brought; the others earlier turns of a chat have encoded.
        vision_ms: see Timings.
    """

    token_ids: list[int]
    messages: Sequence[Message]
    images: list[EncodedImage]
    new_images: list[EncodedImage]
    sampling: SamplingParams
    preprocess_ms: float
    vision_ms: float
