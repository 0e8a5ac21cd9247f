"""A conversation as the text and the token ids that a model was trained on, one placeholder per image."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.inputs.template import TemplateRenderer
from hivtp_ops.errors import BundleError, PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hivtp.runtime.inputs.tokenizer import Tokenizer

# Of a special token.
MAX_TOKEN_LENGTH = 256
# Shows how a template treats text: quotes, markup, an inner line break and letter case must all survive.
_PROBE = 'What is "this" & <that>?\nAnswer.'


@dataclass(frozen=True)
class PromptTemplate:
    r"""How a model wants a conversation to be written.

    Args:
        chat_template: the Jinja template of the checkpoint. None is the form of LLaVA-1.5,
            `USER: <image>\n{prompt} ASSISTANT: {answer}</s>`.
        tokens: the tokenizer's special tokens by the names that templates use, such as "bos_token".
        image_token: the special token that stands for one image.
    """

    chat_template: str | None
    tokens: Mapping[str, str] = field(default_factory=dict)
    image_token: str = "<image>"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """Read what the export wrote.

        Raises:
            BundleError: it is damaged.
        """
        expected = {"chat_template": str | None, "tokens": dict, "image_token": str}
        if set(values) != set(expected):
            raise BundleError(f"prompt.json has keys {sorted(values)}, expected {sorted(expected)}; export it again")
        for name, kind in expected.items():
            if not isinstance(values[name], kind):
                raise BundleError(f"prompt.json: {name} is a {type(values[name]).__name__}; export it again")
        if not all(isinstance(token, str) for token in values["tokens"].values()) or not values["image_token"]:
            raise BundleError("prompt.json: a token is not text; export it again")
        if any(len(token) > MAX_TOKEN_LENGTH for token in (values["image_token"], *values["tokens"].values())):
            raise BundleError(f"prompt.json: a token has more than {MAX_TOKEN_LENGTH} characters; export it again")
        return cls(**values)

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
        """Write a conversation and the opening of the answer, with one image token per image.

        A template is rendered as `apply_chat_template` of transformers renders it. What a message says is data: Jinja
        in it is text, and so are special tokens, which come out as placeholders that `tokenizer.encode` turns into the
        token ids of their text. A system message is put before the user's words where the template has no place for it.

        Args:
            messages: the last one is the user's.
            tokenizer: the model's.

        Raises:
            PromptError: the template fails, or loses words or an image.
        """
        messages = [_escaped(message, tokenizer) for message in _merged(messages)]
        if self.chat_template is None:
            return self._render_llava(_folded(messages))
        form = self._form
        if not form.has_system:
            messages = _folded(messages)
        return self._checked(messages, form.takes_parts)

    def encode(self, tokenizer: Tokenizer, text: str, image_token_id: int) -> list[int]:
        """Turn rendered text into token ids, in which each image is exactly one `image_token_id`.

        Special tokens are added unless the text begins with the bos token, as processors of transformers do.

        Raises:
            PromptError: the tokenizer gives other than one `image_token_id` per image token.
        """
        bos_token = self.tokens.get("bos_token")
        has_bos_token = bos_token is not None and text.startswith(bos_token)
        ids = tokenizer.encode(text, add_special_tokens=not has_bos_token)
        num_images, num_ids = text.count(self.image_token), ids.count(image_token_id)
        if num_ids != num_images:
            raise PromptError(
                f"the text has {num_images} {self.image_token} and the tokenizer made {num_ids} tokens "
                f"{image_token_id} of it; {self.image_token} must be an added token with exactly that id"
            )
        return ids

    def close(self) -> None:
        """Release the process that renders."""
        if self.chat_template is not None:
            self._renderer.close()

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer(self.chat_template or "")

    @cached_property
    def _form(self) -> _Form:
        """What the template takes, found by trying."""
        takes_parts = self._takes_parts()
        probe = [Message("system", ["Be brief-spoken."]), Message("user", [_PROBE])]
        try:
            self._checked(probe, takes_parts)
        except PromptError:
            return _Form(takes_parts, has_system=False)
        return _Form(takes_parts, has_system=True)

    def _takes_parts(self) -> bool:
        """Whether content is given as parts, or else as text, as some Vicuna templates want it."""
        problems = []
        for takes_parts in (True, False):
            try:
                self._checked([Message("user", [ImagePart(b""), _PROBE])], takes_parts)
            except PromptError as error:
                problems.append(error)
            else:
                return takes_parts
        raise problems[0]

    def _checked(self, messages: Sequence[Message], takes_parts: bool) -> str:
        text = self._renderer.render(
            {
                "messages": [
                    {"role": message.role, "content": self._content(message, takes_parts)} for message in messages
                ],
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
                **self.tokens,
            }
        )
        num_images, num_rendered = sum(len(message.images) for message in messages), text.count(self.image_token)
        words = [part.strip() for message in messages for part in message.parts if isinstance(part, str)]
        if num_rendered != num_images or any(part not in text for part in words):
            raise PromptError(
                f"{self._renderer.name} loses words or an image: {num_images} images became {num_rendered} "
                f"{self.image_token} in {text[:500]!r}; use the chat template of a vision-language model"
            )
        return text

    def _content(self, message: Message, takes_parts: bool) -> list[dict[str, str]] | str:
        """The content of a message, as parts or as text."""
        if not takes_parts:
            return self._as_text(message)
        if message.keeps_places:
            return [{"type": "text", "text": self._as_text(message)}]
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
        ]

    def _as_text(self, message: Message) -> str:
        """Words and image tokens in a row; images that have no place of their own come first, a line for each."""
        if message.keeps_places:
            return "".join(part if isinstance(part, str) else self.image_token for part in message.parts)
        return f"{self.image_token}\n" * len(message.images) + message.text

    def _render_llava(self, messages: Sequence[Message]) -> str:
        """The form of LLaVA-1.5, in which the eos token ends an answer."""
        text = ""
        for message in messages:
            if message.role == "user":
                text += f"USER: {self._as_text(message)} ASSISTANT:"
            else:
                text += f" {message.text}{self.tokens.get('eos_token', '')}"
        return text


@dataclass(frozen=True)
class _Form:
    """What a chat template takes.

    Attributes:
        takes_parts: content as a list of parts, or else as text.
        has_system: messages of the system.
    """

    takes_parts: bool
    has_system: bool


def _escaped(message: Message, tokenizer: Tokenizer) -> Message:
    parts = [tokenizer.escape(part) if isinstance(part, str) else part for part in message.parts]
    return Message(message.role, parts, message.keeps_places)


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Successive messages of one role as one: templates want roles to alternate."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            last = merged.pop()
            parts = [*last.parts, "\n", *message.parts]
            message = Message(message.role, parts, last.keeps_places or message.keeps_places)
        merged.append(message)
    return merged


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System messages put before the words of the user's next message."""
    folded: list[Message] = []
    system: list[str] = []
    for message in messages:
        if message.role == "system":
            system.append(message.text)
            continue
        if message.role == "user" and system:
            words = "\n".join(system) + "\n"
            system = []
            first = next((place for place, part in enumerate(message.parts) if isinstance(part, str)), None)
            parts = list(message.parts)
            # After images that come first, so that the text begins where the model expects it.
            parts.insert(len(parts) if first is None else 0 if message.keeps_places else first, words)
            message = Message("user", parts, message.keeps_places)
        folded.append(message)
    return _merged(folded)
