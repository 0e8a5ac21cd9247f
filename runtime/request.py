"""What a pipeline is asked: a conversation that ends with a question, and how to answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hivtp.runtime.inputs.messages import Message, check_text, user_message
from hivtp.runtime.language.sampling import SamplingParams, shortened
from hivtp_ops.errors import PromptError, SettingsError

if TYPE_CHECKING:
    from hivtp.runtime.inputs.images import ImageSource

# The mark that stands for an image in a prompt.
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Request:
    """One request to a pipeline.

    Args:
        prompt: the question; `<image>` marks say where the images stand, and a single image needs none. Or a whole
            message of the user, which holds its images.
        images: paths, encoded bytes, PIL images or uint8 arrays; they are read where they are used.
        sampling: how the tokens are chosen, and where the answer ends.
        system: what the model is told before the conversation.
        history: messages before this one, images included.
        has_marks: False makes `<image>` in the prompt ordinary text: a prompt that comes from somebody else must not
            place images. Then images come before the words.

    Raises:
        PromptError: the prompt is empty or not text, its marks do not match the images, or history is not messages.
        SettingsError: a setting is of the wrong type.
    """

    prompt: str | Message
    images: Sequence[ImageSource] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    system: str | None = None
    history: Sequence[Message] = ()
    has_marks: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise SettingsError(f"sampling must be SamplingParams(...), not a {type(self.sampling).__name__}")
        if not isinstance(self.has_marks, bool):
            raise SettingsError(f"has_marks must be True or False, not {shortened(self.has_marks)}")
        if not _is_list(self.history):
            raise PromptError(f"history must be a list of messages, not a {type(self.history).__name__}")
        # What was checked is what is used, whatever becomes of the caller's lists.
        for name in ("images", "history"):
            if _is_list(getattr(self, name)):
                object.__setattr__(self, name, _read(name, getattr(self, name)))
        for message in self.history:
            if not isinstance(message, Message):
                raise PromptError(f"history must be a list of messages; it holds a {type(message).__name__}")
        if self.system is not None:
            if not isinstance(self.system, str):
                raise PromptError(f"system must be a str, not a {type(self.system).__name__}")
            check_text(self.system)
        _ = self.message

    @property
    def message(self) -> Message:
        """The message that is answered."""
        if isinstance(self.prompt, Message):
            if self.images:
                raise PromptError("a Message holds its images; leave images out")
            if self.prompt.role != "user":
                raise PromptError(f"the message that is answered must be the user's, not the {self.prompt.role}'s")
            return self.prompt
        return user_message(self.prompt, self.images, IMAGE_MARK if self.has_marks else None)

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        system = [] if self.system is None else [Message("system", [self.system])]
        return [*system, *self.history, self.message]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _read(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except Exception as error:
        raise PromptError(f"{name} cannot be read as a list: {type(error).__name__}: {error}") from error
