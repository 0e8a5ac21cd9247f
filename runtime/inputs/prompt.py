"""A conversation as the text and the token ids that a model was trained on, one placeholder per image."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hivtp.runtime.inputs.messages import check_text
from hivtp.runtime.inputs.templating.chat_template import ChatTemplate
from hivtp.runtime.inputs.templating.conversation import as_text, folded, left_to_template, merged
from hivtp_ops.errors import BundleError, PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hivtp.runtime.inputs.literal_tokens import LiteralTokens
    from hivtp.runtime.inputs.messages import Message
    from hivtp.runtime.inputs.tokenizer import Tokenizer

# Of a special token.
MAX_TOKEN_LENGTH = 256


@dataclass(frozen=True)
class PromptTemplate:
    r"""How a model wants a conversation to be written.

    Args:
        chat_template: the Jinja template of the checkpoint. None is the form of LLaVA-1.5,
            `{system} USER: <image>\n{prompt} ASSISTANT: {answer}</s>`.
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
        tokens = [values["image_token"], *values["tokens"].values()]
        if not all(isinstance(token, str) and token.strip() and len(token) <= MAX_TOKEN_LENGTH for token in tokens):
            raise BundleError(
                f"prompt.json: a token is empty, has more than {MAX_TOKEN_LENGTH} characters, or is not text; "
                "export it again"
            )
        try:
            for text in (values["chat_template"] or "", *tokens):
                check_text(text)
        except PromptError as error:
            raise BundleError(f"prompt.json: {error}; export it again") from error
        return cls(**values)

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
        """Write a conversation and the opening of the answer, with one image token per image.

        A template is rendered as `apply_chat_template` of transformers renders it. Successive messages of one role
        become one. A system message goes before the user's next words where the template has no place for it.

        Args:
            messages: the last one is the user's.
            tokenizer: the model's.

        Returns:
            Text for `encode`. What a message says is data: Jinja in it is text, and so are control tokens, in which
            a mark takes the place of one character; see LiteralTokens.

        Raises:
            PromptError: the last message says nothing; or the template fails, takes too long, or loses words or an
                image.
        """
        if not messages or not (messages[-1].images or messages[-1].text.strip()):
            raise PromptError("the prompt is empty; write what the model is to answer")
        escape = self._literals(tokenizer).escape
        messages = merged([message.with_text(escape) for message in messages])
        return self._render_llava(messages) if self._chat is None else self._chat.render(messages)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation as `render` gives it to the template, words unchanged: for a server that has the template."""
        keeps_system = self._chat is None or "system" in self._chat.form.takes_parts
        return [left_to_template(message) for message in folded(merged(messages), keeps_first=keeps_system)]

    def escape(self, text: str, tokenizer: Tokenizer) -> str:
        """Somebody's words as they stand in the text of `render`."""
        return self._literals(tokenizer).escape(text)

    def encode_words(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of somebody's words alone, without a template around them; control tokens in them are text."""
        literals = self._literals(tokenizer)
        return literals.encode(literals.escape(text), add_special_tokens=True)

    def encode(self, tokenizer: Tokenizer, text: str, image_token_id: int) -> list[int]:
        """Turn rendered text into token ids, in which each image is exactly one `image_token_id`.

        Special tokens are added unless the text begins with the bos token, as processors of transformers do.

        Raises:
            PromptError: the tokenizer gives other than one `image_token_id` per image token.
        """
        bos_token = self.tokens.get("bos_token")
        has_bos_token = bos_token is not None and text.startswith(bos_token)
        ids = self._literals(tokenizer).encode(text, add_special_tokens=not has_bos_token)
        num_images, num_ids = text.count(self.image_token), ids.count(image_token_id)
        if num_ids != num_images:
            raise PromptError(
                f"the text has {num_images} {self.image_token} and the tokenizer made {num_ids} tokens "
                f"{image_token_id} of it; {self.image_token} must be an added token with exactly that id"
            )
        return ids

    def start(self) -> None:
        """Start the process that renders, without waiting for it; otherwise the first conversation does."""
        if self._chat is not None:
            self._chat.start()

    def close(self) -> None:
        """Release the process that renders."""
        if self._chat is not None:
            self._chat.close()

    @cached_property
    def _chat(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template, self.tokens, self.image_token)

    @cached_property
    def _tokens(self) -> frozenset[str]:
        return frozenset({self.image_token, *self.tokens.values()})

    def _literals(self, tokenizer: Tokenizer) -> LiteralTokens:
        return tokenizer.literal_tokens("" if self._chat is None else self._chat.form.written, self._tokens)

    def _render_llava(self, messages: Sequence[Message]) -> str:
        """The form of LLaVA-1.5, in which the eos token ends an answer."""
        text = ""
        for message in folded(messages, keeps_first=True):
            if message.role == "system":
                text += f"{message.text} "
            elif message.role == "user":
                text += f"USER: {as_text(message, self.image_token)} ASSISTANT:"
            else:
                text += f" {message.text}{self.tokens.get('eos_token', '')}"
        return text
