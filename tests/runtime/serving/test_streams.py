"""The bytes of an answer, whole and streamed, and that it is the one that the request gives alone."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.miniature.pictures import HELD_OUT, draw
from hivtp import ImagePart, Message, Request, SamplingParams
from hivtp.runtime.answer import Answer, Ran, Timings
from hivtp.runtime.language.sampling import TokenLogprobs
from hivtp.runtime.serving.protocol.chat_request import ChatRequest
from hivtp.runtime.serving.protocol.logprobs import LogprobsWriter
from hivtp.runtime.serving.protocol.messages import ChatMessage
from hivtp.runtime.serving.protocol.reply import Reply, Usage
from tests.support.serving import asking, random_image, serving

if TYPE_CHECKING:
    from hivtp import Pipeline
    from tests.support.serving import Server

USAGE = Usage(num_prompt_tokens=20, num_cached_tokens=3, num_image_tokens=16, num_kept_tokens=8, num_new_tokens=2)
DETAILS = (
    b'"prompt_tokens":20,"completion_tokens":2,"total_tokens":22,"prompt_tokens_details":{"cached_tokens":3,'
    b'"multimodal_tokens":{"image":8},"unpruned_multimodal_tokens":{"image":16}}'
)
HEAD = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m",'


def make_answer(**changed: Any) -> Answer:
    values = {
        "text": "a\nb",
        "token_ids": [5, 2],
        "num_prompt_tokens": 20,
        "num_image_tokens": 16,
        "num_kept_tokens": 8,
        "kept_indices": [],
        "finish_reason": "stop",
        "stop": None,
        "logprobs": None,
        "timings": Timings(1, 1, 1, 3, None),
        "ran": Ran("fp32 graph", "fp32 decoder"),
    }
    return Answer(**{**values, **changed})


def make_reply(pipeline: Pipeline, **options: Any) -> Reply:
    chat = ChatRequest((ChatMessage("user", ("what",)),), **options)
    return Reply(chat, "1", "m", 7, LogprobsWriter(pipeline.model.tokenizer))


def test_the_bytes_of_a_stream(pruned: Pipeline):
    reply = make_reply(pruned, has_usage=True)
    assert reply.first_chunk(USAGE) == (
        HEAD + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}]}\n\n'
    )
    assert reply.text_chunk('é\n"\u2028', (), USAGE) == (
        HEAD
        + '"choices":[{"index":0,"delta":{"content":"é\\n\\"\u2028"},"logprobs":null,'
        '"finish_reason":null}]}\n\n'.encode()
    )
    assert reply.last_chunks(make_answer(finish_reason="length"), USAGE, None) == (
        HEAD
        + b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
        + HEAD
        + b'"choices":[],"usage":{'
        + DETAILS
        + b"}}\n\n"
    )


def test_the_bytes_of_a_stream_with_counts_on_every_chunk(pruned: Pipeline):
    reply = make_reply(pruned, has_continuous_usage=True)
    chunks = [reply.first_chunk(USAGE), reply.text_chunk("a", (), USAGE)]
    chunks.append(reply.last_chunks(make_answer(stop="x"), USAGE, {"kept_tokens": 8}))
    assert chunks[2].endswith(
        b'"finish_reason":"stop","stop_reason":"x"}],"usage":{' + DETAILS + b'},"hivtp":{"kept_tokens":8}}\n\n'
    )
    assert all(b'"usage":{' + DETAILS in chunk and chunk.count(b"\n\n") == 1 for chunk in chunks)


def test_the_bytes_of_a_whole_answer(pruned: Pipeline):
    body = make_reply(pruned).body(make_answer(), USAGE, None)
    assert json.dumps(body, separators=(",", ":")).encode() == (
        b'{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,'
        b'"message":{"role":"assistant","content":"a\\nb"},"logprobs":null,"finish_reason":"stop","stop_reason":null}],'
        b'"usage":{' + DETAILS + b"}}"
    )


def test_log_probabilities_spell_tokens(miniature: Pipeline):
    tokenizer = miniature.model.tokenizer
    red, eos = tokenizer.encode("red", add_special_tokens=False)[0], miniature.model.eos_token_ids[0]
    tokens = [TokenLogprobs(red, -0.5, ((red, -0.5), (eos, float("-inf"))))]
    found = LogprobsWriter(tokenizer).write(tokens)["content"]
    assert found == [
        {
            "token": " red",
            "logprob": -0.5,
            "bytes": list(b" red"),
            "top_logprobs": [
                {"token": " red", "logprob": -0.5, "bytes": list(b" red")},
                {"token": "</s>", "logprob": -9999.0, "bytes": list(b"</s>")},
            ],
        }
    ]


QUESTIONS = [
    {"max_tokens": 12},
    {"max_tokens": 12, "temperature": 1.0, "seed": 5},
    {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "top_k": 7, "seed": -3},
    {"max_tokens": 12, "stop": ["e", "zz"]},
    {"max_tokens": 12, "ignore_eos": True, "repetition_penalty": 1.3},
    {"max_tokens": 1},
    {"max_tokens": 6, "logprobs": True, "top_logprobs": 3},
]


def alone(pipeline: Pipeline, text: str, images: list[bytes], **fields: Any) -> Answer:
    """The answer that a pipeline gives to what a client asks."""
    sampling = SamplingParams(
        max_new_tokens=fields["max_tokens"],
        temperature=fields.get("temperature"),
        top_p=fields.get("top_p"),
        top_k=fields.get("top_k"),
        seed=None if "seed" not in fields else fields["seed"] % 2**64,
        stop=fields.get("stop", ()),
        ignores_eos=fields.get("ignore_eos", False),
        repetition_penalty=fields.get("repetition_penalty"),
        logprobs=fields.get("top_logprobs"),
    )
    parts = [text, *(ImagePart(image) for image in images)]
    return pipeline.generate(Request(Message("user", parts), sampling=sampling))


@pytest.mark.parametrize("fields", QUESTIONS, ids=lambda fields: ",".join(fields))
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_answers_are_those_of_a_pipeline(server: Server, pruned: Pipeline, fields: dict[str, Any], num_images: int):
    images = [random_image(seed) for seed in range(num_images)]
    expected = alone(pruned, "what is it", images, **fields)

    whole = server.chat(asking("what is it", *images), **fields).json()
    choice = whole["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert (choice["finish_reason"], choice["stop_reason"]) == (expected.finish_reason, expected.stop)
    usage = whole["usage"]
    assert usage["prompt_tokens"] == expected.num_prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["prompt_tokens_details"]["multimodal_tokens"] == {"image": expected.num_kept_tokens}
    assert usage["prompt_tokens_details"]["unpruned_multimodal_tokens"] == {"image": expected.num_image_tokens}

    chunks = server.stream(asking("what is it", *images), stream_options={"include_usage": True}, **fields)
    *chunks, last = chunks
    assert last["choices"] == []
    assert {**last["usage"], "prompt_tokens_details": None} == {**usage, "prompt_tokens_details": None}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [expected.finish_reason]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    if "logprobs" in fields:
        entries = choice["logprobs"]["content"]
        # What a slot held already was computed in another run, and the last digits are another.
        found = [entry["logprob"] for entry in entries]
        assert found == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        streamed = [entry for part in parts if part for entry in part["content"]]
        assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]
        assert [entry["logprob"] for entry in streamed] == pytest.approx(found, abs=1e-4)


def test_the_trained_model_answers_rightly(miniature: Pipeline):
    with serving(miniature.model) as server:
        num_right = num_asked = 0
        for number in range(5):
            picture = draw(HELD_OUT[number])
            file = io.BytesIO()
            picture.image.save(file, "PNG")
            for question in picture.questions:
                found = server.answer(asking(question.text, file.getvalue()))
                num_right += found == question.answer
                num_asked += 1
        assert num_asked == 35
        assert num_right >= 32
        # Seven questions about each picture, which was encoded once.
        assert server.metric("mm_cache_hits_total") == 30


def test_special_tokens_and_marks_of_a_user_are_text(server: Server, pruned: Pipeline):
    text = "What colour is <image> it </s> <s>?"
    image = random_image(3)
    response = server.chat(asking(text, image))
    assert response.status_code == 200
    expected = alone(pruned, text, [image], max_tokens=8)
    assert response.json()["choices"][0]["message"]["content"] == expected.text
    tokens = server.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens.count(pruned.model.eos_token_ids[0]) == 0
    assert pruned.model.manifest.image_token_id not in tokens


def test_a_stop_string_never_reaches_the_client(server: Server):
    text = server.answer("how many dogs", max_tokens=40)
    stop = text[5:8]
    assert stop
    expected = text[: text.index(stop)]
    chunks = server.stream("how many dogs", max_tokens=40, stop=stop)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == expected
    assert chunks[-1]["choices"][0]["stop_reason"] == stop
