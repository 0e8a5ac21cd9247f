"""Pydantic AI: an agent with an image, whole and streamed, and one that wants what this server refuses."""

from __future__ import annotations

import asyncio
import base64
import json
import os

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

with open(os.environ["HIVTP_CASE"]) as file:
    CASE = json.load(file)
provider = OpenAIProvider(base_url=CASE["base_url"], api_key=CASE["key"])
model = OpenAIChatModel(CASE["model"], provider=provider)
image = BinaryContent(base64.b64decode(CASE["image"].partition(",")[2]), media_type="image/png")


class Colour(BaseModel):
    """What the server refuses to force an answer into."""

    colour: str


async def main() -> None:
    """Ask."""
    agent = Agent(model)
    first = await agent.run([CASE["question"], image])
    assert first.output == CASE["answer"]
    assert first.usage.input_tokens > 72 if not callable(first.usage) else first.usage().input_tokens > 72
    second = await agent.run(CASE["next_question"], message_history=first.all_messages())
    assert second.output == CASE["next_answer"]
    async with agent.run_stream([CASE["question"], image]) as stream:
        assert await stream.get_output() == CASE["answer"]
    try:
        await Agent(model, output_type=Colour).run([CASE["question"], image])
    except ModelHTTPError as error:
        assert error.status_code == 400
        assert "tool_choice" in str(error.body)
    else:
        raise AssertionError("a forced tool was accepted")


asyncio.run(main())
