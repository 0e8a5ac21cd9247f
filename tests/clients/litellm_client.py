"""LiteLLM, by its two ways to servers of this kind."""

from __future__ import annotations

import json
import os

import litellm

with open(os.environ["HIVTP_CASE"]) as file:
    CASE = json.load(file)
CONTENT = [{"type": "text", "text": CASE["question"]}, {"type": "image_url", "image_url": CASE["image"]}]
QUESTION = [{"role": "user", "content": CONTENT}]

for provider in ("openai", "hosted_vllm"):
    common = {"model": f"{provider}/{CASE['model']}", "api_base": CASE["base_url"], "api_key": CASE["key"]}
    whole = litellm.completion(messages=QUESTION, max_tokens=8, **common)
    assert whole.choices[0].message.content == CASE["answer"]
    chunks = list(litellm.completion(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **common))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == CASE["answer"]
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    try:
        litellm.completion(messages=[{"role": "user", "content": "what " * 2000}], **common)
    except litellm.BadRequestError as error:
        assert "tokens" in str(error)
    else:
        raise AssertionError("a prompt that is too long was accepted")
