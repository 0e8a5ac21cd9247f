"""LangChain's ChatOpenAI: words and images in both of its forms, whole and streamed."""

from __future__ import annotations

import json
import os

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

with open(os.environ["HIVTP_CASE"]) as file:
    CASE = json.load(file)
model = ChatOpenAI(model=CASE["model"], base_url=CASE["base_url"], api_key=CASE["key"], max_tokens=8)
text = {"type": "text", "text": CASE["question"]}
question = HumanMessage([text, {"type": "image_url", "image_url": {"url": CASE["image"]}}])
block = HumanMessage([text, {"type": "image", "base64": CASE["image"].partition(",")[2], "mime_type": "image/png"}])

assert model.invoke([question]).content == CASE["answer"]
assert model.invoke([block]).content == CASE["answer"]
assert "".join(part.content for part in model.stream([question])) == CASE["answer"]
turns = [question, AIMessage(CASE["answer"]), HumanMessage(CASE["next_question"])]
assert model.invoke(turns).content == CASE["next_answer"]
assert model.invoke([question]).usage_metadata["input_tokens"] > 72
# The trained miniature knows no instructions; that they are taken is what counts.
assert isinstance(model.invoke([SystemMessage("Be terse."), question]).content, str)
try:
    model.with_structured_output({"title": "A", "type": "object", "properties": {"colour": {"type": "string"}}}).invoke(
        [question]
    )
except Exception as error:  # noqa: BLE001  which one is the library's affair
    assert "response_format" in str(error) or "tool_choice" in str(error), error
else:
    raise AssertionError("a response format was accepted")
