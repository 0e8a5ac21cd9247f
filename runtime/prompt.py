"""A user's prompt as the text and the token ids that a model was trained on, one placeholder per image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import jinja2

    from hivtp.runtime.tokenizer import Tokenizer

# What a message holds: parts, as the processors of transformers take it, or plain text.
Content = list[dict[str, str]] | str
Message = dict[str, str | Content]

# Shows how a template treats text: quotes, markup, an inner line break and letter case must all survive.
_PROBE = 'What is "this" & <that>?\nAnswer.'


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        prompt: what the user wrote, image tokens included.
        num_images: images of this turn.
        answer: what the model answered.
    """

    prompt: str
    num_images: int
    answer: str


@dataclass(frozen=True)
class PromptTemplate:
    r"""How a model wants a prompt to be written.

    Args:
        chat_template: the Jinja template of the checkpoint. None is the form of LLaVA-1.5,
            `USER: <image>\n{prompt} ASSISTANT: {answer}</s>`.
        bos_token: the tokenizer's token before a text, for the template; None where it has none.
        eos_token: the tokenizer's token after a text, likewise.
        image_token: the mark in a prompt that stands for one image.
    """

    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    image_token: str = "<image>"

    def render(self, prompt: str, num_images: int, history: Sequence[Turn] = ()) -> str:
        """Write one user turn and the opening of the answer, with one image token per image.

        A template is rendered as `apply_chat_template` of transformers renders it. Image tokens in the prompt
        stay where they are; a single image without one comes first. The prompt is data: Jinja in it is text.

        Args:
            prompt: the user's words.
            num_images: images of this turn.
            history: the turns before this one, which are written before it.

        Raises:
            PromptError: the prompt is no text, or its image tokens do not match the images; or the template
                fails, or loses a prompt or an image.
        """
        turns = [*history, Turn(prompt, num_images, "")]
        are_unmarked = [self._check_prompt(turn.prompt, turn.num_images) for turn in turns]
        if self.chat_template is None:
            return self._render_llava(turns, are_unmarked)
        as_parts = _takes_parts(self)
        messages: list[Message] = []
        for turn, is_unmarked in zip(turns, are_unmarked, strict=True):
            messages.append({"role": "user", "content": self._content(turn.prompt, is_unmarked, as_parts)})
            messages.append({"role": "assistant", "content": self._content(turn.answer, False, as_parts)})
        text = self._render_messages(messages[:-1])
        self._check_rendered(text, turns)
        return text

    def encode(self, tokenizer: Tokenizer, text: str, image_token_id: int) -> list[int]:
        """Turn rendered text into token ids, in which each image is exactly one `image_token_id`.

        Special tokens are added unless the text begins with `bos_token`, as processors of transformers do.

        Raises:
            PromptError: the tokenizer gives other than one `image_token_id` per image token.
        """
        has_bos_token = self.bos_token is not None and text.startswith(self.bos_token)
        ids = tokenizer.encode(text, add_special_tokens=not has_bos_token)
        num_images, num_ids = text.count(self.image_token), ids.count(image_token_id)
        if num_ids != num_images:
            raise PromptError(
                f"the text has {num_images} {self.image_token} and the tokenizer made {num_ids} tokens "
                f"{image_token_id} of it; {self.image_token} must be an added token with exactly that id"
            )
        return ids

    def _check_prompt(self, prompt: str, num_images: int) -> bool:
        """Check a prompt against its images; returns whether an image token is still to be put before it."""
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt must be a str, not {type(prompt).__name__}")
        if not prompt.strip():
            raise PromptError("the prompt is empty; write what the model is to answer")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode ({error}); remove lone surrogates") from error
        num_marks = prompt.count(self.image_token)
        is_unmarked = num_marks == 0 and num_images == 1
        if num_marks != num_images and not is_unmarked:
            raise PromptError(
                f"the prompt has {num_marks} {self.image_token} marks and {num_images} images were given; "
                f"write {self.image_token} once per image, where the image belongs"
            )
        return is_unmarked

    def _check_rendered(self, text: str, turns: Sequence[Turn]) -> None:
        num_images, num_rendered = sum(turn.num_images for turn in turns), text.count(self.image_token)
        if num_rendered != num_images or any(turn.prompt.strip() not in text for turn in turns):
            raise PromptError(
                f"{self._name} loses the prompt or an image: {num_images} images became {num_rendered} "
                f"{self.image_token} in {text!r}; use the chat template of a vision-language model"
            )

    def _render_llava(self, turns: Sequence[Turn], are_unmarked: Sequence[bool]) -> str:
        """The form of LLaVA-1.5, in which the end-of-sequence token ends an answer."""
        questions = [
            f"USER: {self._content(turn.prompt, is_unmarked, as_parts=False)} ASSISTANT:"
            for turn, is_unmarked in zip(turns, are_unmarked, strict=True)
        ]
        answers = [f" {turn.answer}{self.eos_token or ''}" for turn in turns[:-1]]
        return "".join(question + answer for question, answer in zip(questions, [*answers, ""], strict=True))

    def _content(self, prompt: str, is_unmarked: bool, as_parts: bool) -> Content:
        if as_parts:
            image: list[dict[str, str]] = [{"type": "image"}] if is_unmarked else []
            return [*image, {"type": "text", "text": prompt}]
        return f"{self.image_token}\n{prompt}" if is_unmarked else prompt

    def _render_messages(self, messages: Sequence[Message]) -> str:
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            return _compile(self.chat_template or "").render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                # transformers passes only the tokens that there are: an undefined one renders as nothing.
                **{name: token for name, token in tokens.items() if token is not None},
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise PromptError(f"{self._name} failed: {type(error).__name__}: {error}") from error

    @property
    def _name(self) -> str:
        return f"the chat template {(self.chat_template or '')[:60]!r}"


@lru_cache(maxsize=16)
def _takes_parts(template: PromptTemplate) -> bool:
    """Whether content is given to a template as parts, or else as text, as some Vicuna templates want it."""
    problems = []
    for as_parts in (True, False):
        try:
            content = template._content(_PROBE, is_unmarked=True, as_parts=as_parts)
            text = template._render_messages([{"role": "user", "content": content}])
            template._check_rendered(text, [Turn(_PROBE, 1, "")])
        except PromptError as error:
            problems.append(error)
        else:
            return as_parts
    raise problems[0]


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """Compile a chat template in a sandbox like that of `transformers.utils.chat_template_utils`."""
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Renders the body of `{% generation %}`, a tag that marks an assistant's words for training."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(lineno)

        def _render(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Refuses private names, by which a template could reach into Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *pairs = args
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*pairs, **kwargs).items():
                Namespace.__setitem__(self, name, value)

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no private name, as {name!r}")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(namespace=Namespace, raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)
