"""The client of OpenAI for Python: whole, streamed, asynchronous, with counts, log probabilities and errors."""

from __future__ import annotations

import asyncio
import json
import os
import time

import openai
from pydantic import BaseModel

with open(os.environ["HIVTP_CASE"]) as file:
    CASE = json.load(file)
IMAGE = {"type": "image_url", "image_url": {"url": CASE["image"], "detail": "auto"}}
QUESTION = [{"role": "user", "content": [{"type": "text", "text": CASE["question"]}, IMAGE]}]
client = openai.OpenAI(base_url=CASE["base_url"], api_key=CASE["key"])

assert [model.id for model in client.models.list()] == [CASE["model"]]
assert client.models.retrieve(CASE["model"]).id == CASE["model"]

whole = client.chat.completions.create(model=CASE["model"], messages=QUESTION, max_tokens=8)
assert whole.choices[0].message.content == CASE["answer"]
assert whole.choices[0].finish_reason == "stop"
assert whole.usage.prompt_tokens_details.multimodal_tokens == {"image": 72}

# The next turn of the conversation finds the last one in the KV cache.
turns = [
    *QUESTION,
    {"role": "assistant", "content": CASE["answer"]},
    {"role": "user", "content": CASE["next_question"]},
]
second = client.chat.completions.create(model=CASE["model"], messages=turns)
assert second.choices[0].message.content == CASE["next_answer"]
assert second.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens

stream = client.chat.completions.create(
    model=CASE["model"],
    messages=QUESTION,
    stream=True,
    stream_options={"include_usage": True},
    logprobs=True,
    top_logprobs=2,
    extra_body={"hivtp": {"include": ["kept_indices"]}},
)
chunks = list(stream)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == CASE["answer"]
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
# The second chunk tells what pruning kept.
assert len(chunks[2].choices[0].logprobs.content[0].top_logprobs) == 2
assert chunks[-2].hivtp["kept_tokens"] == 72
for chunk in chunks:
    # As strictly as the library can.
    type(chunk).model_validate(chunk.model_dump(), strict=True)

with client.chat.completions.stream(model=CASE["model"], messages=QUESTION) as helper:
    assert helper.get_final_completion().choices[0].message.content == CASE["answer"]

for messages, kind, code in (
    (QUESTION, openai.NotFoundError, "model_not_found"),
    ([{"role": "user", "content": "what " * 2000}], openai.BadRequestError, "context_length_exceeded"),
):
    model = "gpt-4" if kind is openai.NotFoundError else CASE["model"]
    try:
        client.chat.completions.create(model=model, messages=messages)
    except kind as error:
        assert error.code == code
    else:
        raise AssertionError(code)


class Colour(BaseModel):
    """What the server refuses to force an answer into."""

    colour: str


try:
    client.chat.completions.parse(model=CASE["model"], messages=QUESTION, response_format=Colour)
except openai.BadRequestError as error:
    assert error.param == "response_format"
else:
    raise AssertionError("a response format was accepted")
try:
    openai.OpenAI(base_url=CASE["base_url"], api_key="other").models.list()
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key"
else:
    raise AssertionError("another key was accepted")
try:
    client.responses.create(model=CASE["model"], input="hi")
except openai.NotFoundError as error:
    assert error.code == "not_found"

# A stream that is left frees the server at once.
with client.chat.completions.create(
    model=CASE["model"], messages=QUESTION, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
) as left:
    next(iter(left))
started = time.monotonic()
assert client.chat.completions.create(model=CASE["model"], messages=QUESTION).choices[0].message.content
assert time.monotonic() - started < 5


async def ask_many() -> None:
    """Several at once."""
    async with openai.AsyncOpenAI(base_url=CASE["base_url"], api_key=CASE["key"]) as many:
        answers = await asyncio.gather(
            *(many.chat.completions.create(model=CASE["model"], messages=QUESTION) for _ in range(8))
        )
    assert {answer.choices[0].message.content for answer in answers} == {CASE["answer"]}


asyncio.run(ask_many())
