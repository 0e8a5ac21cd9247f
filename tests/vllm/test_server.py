"""A server with the plugin, asked by OpenAI's client: what a user of the plugin sees."""

from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.timing.vllm_server import VllmServerError, vllm_server
from hivtp.runtime.language.vllm.backend import PLUGIN_SIGNATURE
from tests.support.family import NUM_NEW, SIZES, picture
from tests.vllm.conftest import ARGUMENTS
from tests.vllm.reference import RULES, Prompt, expected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from benchmarks.timing.vllm_server import VllmServer
    from tests.support.family import Family

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(llava: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(llava.folder, RULES["llava"], log, *ARGUMENTS, "--enable-prompt-tokens-details") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(file.getvalue())}"}}


def embeds_part(num_tokens: int, width: int = 128) -> dict[str, Any]:
    """An image that somebody else has encoded, as vLLM takes it."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng(num_tokens).standard_normal((num_tokens, width), np.float32))
    return {"type": "image_embeds", "image_embeds": encoded(file.getvalue())}


def ask(client: Any, words: str, *parts: dict[str, Any], **settings: Any) -> Any:
    # vLLM leaves the bos token out of chats, which the text of transformers begins with.
    extra = {"ignore_eos": True, "return_token_ids": True, "add_special_tokens": True}
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
    return client.chat.completions.create(
        model="model", messages=messages, temperature=0, max_tokens=NUM_NEW, extra_body=extra, **settings
    )


def test_answers_and_usage_are_those_of_the_pruned_prompt(client, llava):
    images = (picture(7, SIZES[1]), picture(8, SIZES[2]))
    prompts = [
        Prompt("USER: <image>\nwhat is this? ASSISTANT:", images[:1]),
        Prompt("USER: <image>\n<image>\nwhat is this? ASSISTANT:", images),
    ]
    tokens, lengths = expected(llava, RULES["llava"], prompts)
    for prompt, answer_tokens, length in zip(prompts, tokens, lengths, strict=True):
        answer = ask(client, "what is this?", *map(image_part, prompt.images))
        assert answer.choices[0].token_ids == answer_tokens
        assert answer.usage.prompt_tokens == length
        # Of 8 x 8 patches the preset 192 keeps a third.
        details = answer.usage.prompt_tokens_details.model_dump()
        assert details["multimodal_tokens"] == {"image": 21 * len(prompt.images)}


def test_a_stream_has_the_same_words(client):
    part = image_part(picture(9))
    whole = ask(client, "where is the car?", part).choices[0].message.content
    chunks = ask(client, "where is the car?", part, stream=True, stream_options={"include_usage": True})
    deltas = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas if chunk.choices) == whole
    assert deltas[-1].usage.completion_tokens == NUM_NEW


def test_images_and_embeddings_of_several_lengths_at_once(client, server):
    """Each answer is the one that the request gets alone; vLLM's own LLaVA ends here."""
    parts = [embeds_part(length) for length in (3, 9, 21, 40)] * 2 + [image_part(picture(n)) for n in range(4)]

    def tokens_of(part: dict[str, Any]) -> list[int]:
        found: list[int] = ask(client, "how many?", part).choices[0].token_ids
        return found

    with ThreadPoolExecutor(len(parts)) as threads:
        together = list(threads.map(tokens_of, parts))
    assert together == [tokens_of(part) for part in parts]
    assert server.process.poll() is None


def test_embeddings_of_another_width_are_refused_and_the_plugin_says_that_it_is_there(client):
    import openai

    with pytest.raises(openai.BadRequestError, match=re.escape(PLUGIN_SIGNATURE)):
        ask(client, "how many?", embeds_part(21, width=64))


def test_a_rule_without_an_exact_count_is_refused_at_the_start(llava, tmp_path):
    with (
        pytest.raises(VllmServerError, match="keeps more of one image than of another"),
        vllm_server(llava.folder, {"preset": "paper"}, tmp_path / "log", *ARGUMENTS),
    ):
        pytest.fail("it has started")
