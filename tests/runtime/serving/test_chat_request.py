"""The body of a chat: what is accepted, refused with the path of the field, and ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hivtp.runtime.serving.flow.stages import to_request
from hivtp.runtime.serving.protocol.chat_request import ChatRequest, parse_chat
from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.protocol.fields import parse_object
from hivtp.runtime.serving.protocol.messages import ChatMessage, ImageReference
from hivtp.runtime.serving.settings import ServerSettings

QUESTION = [{"role": "user", "content": "what"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}


def parse(messages: Any = QUESTION, settings: ServerSettings | None = None, **fields: Any) -> ChatRequest:
    content = json.dumps({"messages": messages, **fields}).encode()
    return parse_chat(parse_object(content), settings or ServerSettings())


def error_of(*arguments: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(*arguments, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", 0),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", False),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", "7"),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("stop", ["a" * 65]),
        ("stop", [1]),
        ("stop", {}),
        ("logprobs", 2),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stream", "yes"),
        ("stream_options", []),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("min_p", 0.1),
        ("min_tokens", 3),
        ("logit_bias", {"3": 1}),
        ("prompt_logprobs", 0),
        ("echo", True),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {}),
        ("mm_processor_kwargs", {}),
        ("documents", []),
        ("guided_json", {}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("hivtp", []),
        ("model", 3),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value):
    assert error_of(**{field: value}).param == field


def test_the_code_says_what_is_not_supported():
    assert error_of(response_format={"type": "json_object"}).code == "unsupported_response_format"
    assert error_of(n=2).code == "unsupported"
    assert error_of(hivtp={"include": ["kept_indices", "weights"]}).param == "hivtp.include[1]"
    assert error_of(stream_options={"include_usage": 1}).param == "stream_options.include_usage"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "min_p": 0, "echo": False},
        {"response_format": {"type": "text"}, "tool_choice": "none", "tools": [{"type": "function"}]},
        {"tool_choice": "auto", "parallel_tool_calls": False, "user": "u", "metadata": {"a": 1}, "store": True},
        {"temperature": None, "top_p": None, "stop": None, "max_tokens": None, "chat_template": None, "n": None},
        {"stop": [], "stream_options": None, "hivtp": None, "seed": -1, "top_k": -1, "temperature": 2.5},
    ],
)
def test_what_changes_nothing_is_accepted(fields):
    assert parse(**fields).messages == (ChatMessage("user", ("what",)),)


def test_fields_are_read():
    chat = parse(
        model="m",
        max_tokens=5,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=-1,
        stop="x",
        logprobs=True,
        top_logprobs=2,
        ignore_eos=True,
        stream=True,
        repetition_penalty=1.1,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        hivtp={"include": ["kept_indices"]},
    )
    assert (chat.model, chat.max_tokens, chat.temperature, chat.top_p, chat.top_k) == ("m", 7, 0.5, 0.9, 3)
    assert (chat.seed, chat.stop, chat.logprobs, chat.repetition_penalty) == (2**64 - 1, ("x",), 2, 1.1)
    assert chat.ignores_eos
    assert chat.streams
    assert chat.has_usage
    assert chat.has_continuous_usage
    assert chat.includes == {"kept_indices"}
    assert parse(top_k=-1).top_k == 0
    assert parse(logprobs=True).logprobs == 0
    assert parse(logprobs=False).logprobs is None
    assert parse().includes is None
    assert parse(hivtp={}).includes == frozenset()


def test_unknown_fields_are_ignored_and_named_or_refused():
    assert parse(user="u", temperatur=1, tools=[]).ignored == ("user", "temperatur", "tools")
    assert error_of(QUESTION, ServerSettings(refuses_unknown=True), temperatur=1).param == "temperatur"
    assert parse(QUESTION, ServerSettings(refuses_unknown=True), user="u").ignored == ("user",)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("what", "messages"),
        (["what"], "messages[0]"),
        ([{"content": "what"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": " \n"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([*QUESTION, {"role": "assistant", "content": "a"}], "messages[1]"),
        ([{"role": "system", "content": "a"}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["a", 3]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url.url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}], "messages[0].content[0].image_url"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}],
            "messages[0].content[0].image_url.url",
        ),
        ([{"role": "assistant", "content": [IMAGE]}, *QUESTION], "messages[0].content[0]"),
        ([{"role": "system", "content": [IMAGE]}, *QUESTION], "messages[0].content[0]"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}, *QUESTION], "messages[0].tool_calls"),
        ([{"role": "user", "content": [IMAGE] * 9}], "messages[0].content[8].image_url.url"),
    ],
)
def test_a_message_that_cannot_be_is_named(messages, param):
    assert error_of(messages).param == param


def test_contents_have_many_forms():
    forms = [
        "what",
        ["what"],
        [{"type": "text", "text": "what"}],
        [{"text": "what", "type": "text"}],
        [{"text": "what"}],
        [{"type": "input_text", "text": "what"}],
    ]
    assert {parse([{"role": "user", "content": form}]).messages for form in forms} == {
        (ChatMessage("user", ("what",)),)
    }
    url = IMAGE["image_url"]["url"]
    as_object = parse(
        [{"role": "user", "content": [{"image_url": {"detail": "low", "url": url}, "type": "image_url"}]}]
    )
    assert as_object.messages[0].parts == (ImageReference(url, "messages[0].content[0].image_url.url"),)
    as_string = parse([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}])
    assert as_string.messages[0].parts == (ImageReference(url, "messages[0].content[0].image_url"),)
    assert parse([*QUESTION, {"role": "assistant", "content": None}, *QUESTION]).messages[1].parts == ("",)


@pytest.mark.parametrize("content", [b"", b"[]", b'"a"', b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000, b"1" * 5000])
def test_a_body_that_is_not_an_object_is_refused(content):
    with pytest.raises(ApiError) as caught:
        parse_object(content)
    assert caught.value.status == 400


def test_the_system_speaks_at_the_start_and_later():
    messages = [
        {"role": "system", "content": "one"},
        {"role": "developer", "content": "two"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": "three"},
        {"role": "user", "content": "d"},
    ]
    request = to_request(parse(messages), {}, 10)
    assert request.system == "one\ntwo"
    assert [(message.role, message.text) for message in request.history] == [
        ("user", "a"),
        ("user", "b"),
        ("assistant", "c"),
    ]
    assert request.message.text == "three\nd"


def test_the_number_of_tokens_is_bounded():
    assert to_request(parse(), {}, 10).sampling.max_new_tokens == 10
    assert to_request(parse(max_tokens=3), {}, 10).sampling.max_new_tokens == 3
    assert to_request(parse(max_tokens=10**9), {}, 10).sampling.max_new_tokens == 10
