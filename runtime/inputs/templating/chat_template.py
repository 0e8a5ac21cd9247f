"""A chat template, and what it takes of a conversation: found by trying, since no checkpoint says it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hivtp.runtime.inputs.messages import ImagePart, Message, check_text
from hivtp.runtime.inputs.templating.conversation import as_text, folded
from hivtp.runtime.inputs.templating.renderer import TemplateFailedError, TemplateRenderer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hivtp.runtime.inputs.messages import Role


@dataclass(frozen=True)
class TemplateForm:
    """What a template takes.

    Attributes:
        takes_parts: for each role that it has a place for: content is given as a list of parts, or else as text, as
            some Vicuna templates want it.
        written: the template, and text that it wrote.
    """

    takes_parts: Mapping[Role, bool]
    written: str


class ChatTemplate:
    """Writes conversations with a Jinja template.

    Args:
        source: the template.
        tokens: special tokens by the names that templates use.
        image_token: stands for one image.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], image_token: str) -> None:
        self._source = source
        self._tokens = tokens
        self._image_token = image_token
        self._renderer = TemplateRenderer(source)

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation and the opening of the answer.

        Args:
            messages: roles alternate. A system message goes before the user's words where the template has no place
                for it.

        Raises:
            PromptError: the template fails, or takes too long, or loses words or an image.
        """
        form = self.form
        return self._write(folded(messages, keeps_first="system" in form.takes_parts), form.takes_parts)

    @cached_property
    def form(self) -> TemplateForm:
        """What the template takes.

        Raises:
            PromptError: it cannot write a question about an image, or takes too long.
        """
        question = Message("user", [ImagePart(b""), _probe("user")])
        probes: dict[Role, list[Message]] = {
            "user": [question],
            "assistant": [question, Message("assistant", [_probe("assistant")]), Message("user", [_probe("user")])],
            "system": [Message("system", [_probe("system")]), question],
        }
        takes_parts: dict[Role, bool] = {}
        written, problems = [self._source], []
        for role, messages in probes.items():
            for is_in_parts in (True, False):
                try:
                    written.append(self._write(messages, takes_parts | {role: is_in_parts}))
                except TemplateFailedError as error:
                    problems.append(error)
                else:
                    takes_parts[role] = is_in_parts
                    break
            if "user" not in takes_parts:
                raise problems[0]
        return TemplateForm(takes_parts, "\n".join(written))

    def start(self) -> None:
        """Start the process that renders, without waiting for it."""
        self._renderer.start()

    def close(self) -> None:
        """Release the process that renders."""
        self._renderer.close()

    def _write(self, messages: Sequence[Message], takes_parts: Mapping[Role, bool]) -> str:
        text = self._renderer.render(
            {
                **self._tokens,
                "messages": [
                    {"role": message.role, "content": self._content(message, takes_parts.get(message.role, True))}
                    for message in messages
                ],
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            }
        )
        check_text(text)
        num_images, num_rendered = sum(len(message.images) for message in messages), text.count(self._image_token)
        words = [part.strip() for message in messages for part in message.parts if isinstance(part, str)]
        if num_rendered != num_images or any(part not in text for part in words):
            raise TemplateFailedError(
                f"{self._renderer.name} loses words or an image: {num_images} images became {num_rendered} "
                f"{self._image_token} in {text[:500]!r}; use the chat template of a vision-language model"
            )
        return text

    def _content(self, message: Message, takes_parts: bool) -> list[dict[str, str]] | str:
        """The content of a message, as parts or as text."""
        if not takes_parts:
            return as_text(message, self._image_token)
        if message.keeps_places:
            return [{"type": "text", "text": as_text(message, self._image_token)}]
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
        ]


def _probe(role: Role) -> str:
    """Words that show how a template treats them: quotes, markup, an inner line break and case must survive."""
    return f'The {role} says "this" & <that>.\nIs it so?'
