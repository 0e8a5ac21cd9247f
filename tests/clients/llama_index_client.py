"""LlamaIndex's OpenAILike: whole and streamed."""

from __future__ import annotations

import json
import os

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

with open(os.environ["HIVTP_CASE"]) as file:
    CASE = json.load(file)
model = OpenAILike(
    model=CASE["model"],
    api_base=CASE["base_url"],
    api_key=CASE["key"],
    is_chat_model=True,
    context_window=512,
    max_tokens=8,
    temperature=0,
)
image = ImageBlock(url=CASE["image"], image_mimetype="image/png")
question = ChatMessage(role="user", blocks=[TextBlock(text=CASE["question"]), image])

assert model.chat([question]).message.content == CASE["answer"]
*_, last = model.stream_chat([question])
assert last.message.content == CASE["answer"]
turns = [
    question,
    ChatMessage(role="assistant", content=CASE["answer"]),
    ChatMessage(role="user", content=CASE["next_question"]),
]
assert model.chat(turns).message.content == CASE["next_answer"]
