"""Requests that real clients sent, byte for byte what they put into them: each gets what the specification says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.serving import Server

FOLDER = Path(__file__).parents[2] / "data" / "client-requests"
FILES = sorted(FOLDER.glob("*.json"))
# What this server cannot do is refused, and the error names the field.
REFUSED = {
    "instructor-json": (400, "response_format"),
    "instructor-json_schema": (400, "response_format"),
    "instructor-tools": (400, "tool_choice"),
    "langchain-structured": (400, "response_format"),
    "openai-parse": (400, "response_format"),
    "openai-multiturn": (400, "chat_template_kwargs"),
    "openai-responses": (404, None),
    "pydantic-ai-structured": (400, "tool_choice"),
}


def test_all_requests_are_there():
    assert len(FILES) == 33
    assert {file.name.removesuffix("-01.json") for file in FILES} >= set(REFUSED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_request_of_a_real_client(server: Server, file: Path):
    captured = json.loads(file.read_text())
    skipped = {"host", "content-length", "connection", "authorization", "accept-encoding"}
    headers = {name: value for name, value in captured["headers"].items() if name not in skipped}
    content = None if captured["body"] is None else json.dumps(captured["body"]).encode()
    response = server.client.request(captured["method"], captured["path"], headers=headers, content=content)

    if refused := REFUSED.get(file.name.removesuffix("-01.json")):
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (response.status_code, error["param"]) == refused
        return
    assert response.status_code == 200, response.text
    if captured["path"] != "/v1/chat/completions":
        assert response.json()
        return
    check_answer(captured["body"], response.content)


def check_answer(request: dict, content: bytes) -> None:
    """The answer has the form that the request asks for."""
    if not request.get("stream"):
        answer = json.loads(content)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["prompt_tokens_details"]["multimodal_tokens"]["image"] > 0
        return
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    options = request.get("stream_options") or {}
    has_counts = [bool(chunk.get("usage")) for chunk in chunks]
    if options.get("continuous_usage_stats"):
        assert all(has_counts)
    else:
        assert has_counts == [False] * (len(chunks) - 1) + [bool(options.get("include_usage"))]
    last = [chunk for chunk in chunks if chunk["choices"]][-1]
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    if request.get("ignore_eos"):
        assert last["choices"][0]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == request["max_completion_tokens"]
    if request.get("logprobs"):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
        assert tokens
        assert all(len(token["top_logprobs"]) == request["top_logprobs"] for token in tokens)
