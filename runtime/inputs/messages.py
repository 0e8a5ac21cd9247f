"""A conversation: who said what, with images between the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivtp.runtime.inputs.images import ImageSource

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImagePart:
    """An image in a message.

    Args:
        source: what `load_image` takes; or a PreparedImage; or an EncodedImage, for one that an earlier turn has
            encoded.
    """

    source: Any


Part: TypeAlias = "str | ImagePart"


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        role: who speaks.
        parts: text and images, in the order in which they were given. Text is text: nothing in it is a mark or a
            special token.
        keeps_places: images stay between the words where they stand. Otherwise the chat template places them, as it
            does in transformers; those of LLaVA-1.5 put all images of a message first.

    Raises:
        PromptError: there is no such role, a part is neither text nor an image, or text is not valid Unicode.
    """

    role: Role
    parts: Sequence[Part]
    keeps_places: bool = False

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise PromptError(f"the role of a message is one of {', '.join(get_args(Role))}, not {self.role!r}")
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence):
            raise PromptError(f"the parts of a message must be a list, not a {type(self.parts).__name__}")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if isinstance(part, str):
                check_text(part)
            elif not isinstance(part, ImagePart):
                raise PromptError(f"a part of a message is text or an ImagePart, not a {type(part).__name__}")
            elif self.role != "user":
                raise PromptError(f"only a user's message holds images, and this one is of the {self.role}")

    @property
    def text(self) -> str:
        """The words, without the images."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Any]:
        """The sources of the images, in order."""
        return [part.source for part in self.parts if isinstance(part, ImagePart)]

    def with_text(self, change: Callable[[str], str]) -> Message:
        """The same message with its words changed."""
        parts = [change(part) if isinstance(part, str) else part for part in self.parts]
        return replace(self, parts=parts)


def user_message(prompt: str, images: Sequence[ImageSource], mark: str | None) -> Message:
    """A user's message from a prompt and its images.

    Args:
        prompt: the words.
        images: in the order of their marks.
        mark: what stands for an image in the prompt; a single image needs none. None: nothing does, and the images
            come before the words.

    Raises:
        PromptError: the prompt is not text, or empty, or its marks do not match the images.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt must be a str, not a {type(prompt).__name__}")
    if not prompt.strip():
        raise PromptError("the prompt is empty; write what the model is to answer")
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise PromptError(f"images must be a list of images, not a {type(images).__name__}; write images=[image]")
    parts = [ImagePart(image) for image in images]
    words = [prompt] if mark is None else prompt.split(mark)
    num_marks = len(words) - 1
    if num_marks == 0 and (mark is None or len(parts) < 2):
        return Message("user", [*parts, prompt])
    if num_marks != len(parts):
        raise PromptError(
            f"the prompt has {num_marks} {mark} marks and {len(parts)} images were given; "
            f"write {mark} once per image, where the image belongs"
        )
    between = [item for pair in zip(words, parts, strict=False) for item in pair]
    return Message("user", [part for part in [*between, words[-1]] if part != ""], keeps_places=True)


def check_text(text: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        PromptError: it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode ({error}); remove lone surrogates") from error
