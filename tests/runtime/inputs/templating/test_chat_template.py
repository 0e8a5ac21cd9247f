"""What a template takes is found by trying, and the rest is fitted to it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.inputs.templating import renderer
from hivtp.runtime.inputs.templating.chat_template import ChatTemplate
from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = ImagePart(b"")
PARTS = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
LOOP = "{% for m in messages %}[{{ m.role }}]"
END = "{% endfor %}"
# Mistral's: roles must alternate, and there is no system.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "[{{ m.role }}]" + PARTS + END
)
# Llama 2's: the system is a text, and users give parts.
SYSTEM_TEXT = (
    "{% if messages[0].role == 'system' %}{{ '<<SYS>>' + messages[0].content + '<</SYS>>' }}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP + PARTS + END
)
ASSISTANT_TEXT = LOOP + "{% if m.role == 'assistant' %}{{ m.content + '!' }}{% else %}" + PARTS + "{% endif %}" + END
TURNS = [
    Message("system", ["Be brief."]),
    Message("user", [IMAGE, "What?"]),
    Message("assistant", ["A cat."]),
    Message("user", ["Why?"]),
]


@pytest.fixture
def make() -> Iterator[Callable[[str], ChatTemplate]]:
    made: list[ChatTemplate] = []

    def make(source: str) -> ChatTemplate:
        made.append(ChatTemplate(source, {"eos_token": "</s>"}, "<image>"))
        return made[-1]

    yield make
    for template in made:
        template.close()


@pytest.mark.parametrize(
    ("source", "takes_parts", "expected"),
    [
        (
            LOOP + PARTS + END,
            {"user": True, "assistant": True, "system": True},
            "[system]Be brief.[user]<image>What?[assistant]A cat.[user]Why?",
        ),
        (
            STRICT,
            {"user": True, "assistant": True},
            "[user]<image>Be brief.\nWhat?[assistant]A cat.[user]Why?",
        ),
        (
            SYSTEM_TEXT,
            {"user": True, "assistant": True, "system": False},
            "<<SYS>>Be brief.<</SYS>>[user]<image>What?[assistant]A cat.[user]Why?",
        ),
        (
            ASSISTANT_TEXT,
            {"user": True, "assistant": False, "system": True},
            "[system]Be brief.[user]<image>What?[assistant]A cat.![user]Why?",
        ),
        (
            LOOP + "{{ m.content | trim }}" + END,
            {"user": False, "assistant": False, "system": False},
            "[system]Be brief.[user]<image>\nWhat?[assistant]A cat.[user]Why?",
        ),
    ],
    ids=["parts", "strict", "system text", "assistant text", "text"],
)
def test_each_role_gets_the_content_that_the_template_takes(make, source, takes_parts, expected):
    template = make(source)
    assert template.form.takes_parts == takes_parts
    assert template.render(TURNS) == expected


def test_what_a_template_does_not_take_is_said_in_its_own_words(make):
    template = make(STRICT)
    with pytest.raises(PromptError, match="failed: TemplateError: Conversation roles must alternate"):
        template.render([Message("assistant", ["Hello."]), Message("user", ["Hi."])])
    only_questions = make(
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + LOOP + PARTS + END
    )
    assert only_questions.render(TURNS[-1:]) == "[user]Why?"
    with pytest.raises(PromptError, match="one turn"):
        only_questions.render(TURNS)


def test_what_it_writes_is_found_for_every_role(make):
    written = make(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}" + PARTS + END + "{{ '<|e' + 'nd|>' }}"
    ).form.written
    for token in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        assert token in written


def test_a_template_without_end_costs_one_limit_and_not_one_for_every_trial(make, monkeypatch):
    monkeypatch.setattr(renderer, "MAX_SECONDS", 1.0)
    template = make("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    started = time.monotonic()
    with pytest.raises(PromptError, match="ran for more than 1 seconds"):
        template.render(TURNS)
    assert time.monotonic() - started < 1.8


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "loop", "namespace", "__class__"])
def test_a_token_with_the_name_of_something_else_does_no_harm(name):
    template = ChatTemplate(LOOP + PARTS + END, {name: "x"}, "<image>")
    assert template.render(TURNS[-1:]) == "[user]Why?"
    template.close()
