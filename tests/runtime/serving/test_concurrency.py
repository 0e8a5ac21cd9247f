"""Many requests at once: each answer is the one that the request gives alone, and nothing leaks."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hivtp.runtime.language.scheduling.scheduler import Scheduler
from tests.runtime.serving.test_streams import alone
from tests.support.answers import load
from tests.support.serving import CHAT, asking, body, random_image, serving, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline
    from tests.support.serving import Server

IMAGES = [random_image(seed) for seed in range(6)]
TEXTS = ["what is it", "how many dogs are there", "where is the red circle", "is the house left of the tree"]


def make_question(number: int) -> tuple[str, list[bytes], dict[str, Any]]:
    """One of many that differ in words, images and sampling."""
    choose = random.Random(number)
    images = choose.sample(IMAGES, choose.choice([0, 0, 1, 1, 2]))
    fields: dict[str, Any] = {"max_tokens": choose.randint(1, 24)}
    if choose.random() < 0.4:
        fields |= {"temperature": choose.choice([0.7, 1.0]), "seed": number}
    if choose.random() < 0.2:
        fields["stop"] = ["e"]
    return choose.choice(TEXTS), images, fields


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 8, "steps_per_chunk": 1}, {"num_slots": 1}], ids=str)
def test_a_hundred_arrivals_and_departures(pruned: Pipeline, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A fifth of the clients leave after the first token; memory is for two long requests at a time."""
    questions = [make_question(number) for number in range(100)]
    expected = [alone(pruned, text, images, **fields).text for text, images, fields in questions]
    budget = 320 * pruned.model.language.kv_bytes_per_position
    reserved: list[int] = []
    step = Scheduler.step

    def watched_step(scheduler: Scheduler) -> bool:
        has_more = step(scheduler)
        reserved.append(scheduler.num_reserved_bytes)
        return has_more

    monkeypatch.setattr(Scheduler, "step", watched_step)
    with serving(pruned.model, max_kv_bytes=budget, max_queued=100, queue_seconds=120, **settings) as server:

        def ask(number: int) -> str | None:
            text, images, fields = questions[number]
            if number % 5 == 4:
                leave_after_the_first_event(server, asking(text, *images), fields)
                return None
            if number % 2:
                chunks = server.stream(asking(text, *images), **fields)
                return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return server.answer(asking(text, *images), **fields)

        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(ask, range(len(questions))))
        server.wait_until_idle()
        assert [text for text in found if text is not None] == [
            text for number, text in enumerate(expected) if number % 5 != 4
        ]
        assert max(reserved) <= budget
        assert server.service._events == {}
        assert server.service.engine._jobs == set()
        assert server.service.admission.num_waiting_bytes == 0
        assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0


def leave_after_the_first_event(server: Server, content: Any, fields: dict[str, Any]) -> None:
    with httpx.stream("POST", server.url + CHAT, json=body(content, stream=True, **fields), timeout=60) as response:
        assert response.status_code == 200
        next(response.iter_raw())


def test_text_does_not_wait_for_images(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    """Four conversations with images stand still in the vision stage, and a question in words is answered."""
    release = threading.Event()
    encode = type(pruned.model).encode_images

    def held(model: Any, images: Any) -> Any:
        if images:
            release.wait(30)
        return encode(model, images)

    monkeypatch.setattr(type(pruned.model), "encode_images", held)
    with serving(pruned.model, max_prepared=2) as server, ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(server.answer, asking("what", IMAGES[number])) for number in range(4)]
        wait_for(lambda: server.service.admission.num_inside == 4)
        assert server.answer("how many dogs") == alone(pruned, "how many dogs", [], max_tokens=8).text
        assert not any(task.done() for task in waiting)
        # Of four two are decoded; the others hold their encoded bytes and no pixels.
        wait_for(lambda: 0 < server.service.admission.num_waiting_bytes <= 2 * len(IMAGES[0]) + 200)
        release.set()
        expected = [alone(pruned, "what", [IMAGES[number]], max_tokens=8).text for number in range(4)]
        assert [task.result() for task in waiting] == expected


def test_a_short_request_is_not_blocked_by_a_long_one(pruned: Pipeline):
    with serving(pruned.model) as server, ThreadPoolExecutor(1) as threads:
        long = threads.submit(server.answer, "how many", max_tokens=450, ignore_eos=True)
        wait_for(lambda: server.service.engine.state.num_running == 1)
        server.answer("what", max_tokens=2)
        assert not long.done()
        long.result()


def test_the_next_turn_of_a_chat_finds_the_last_one(server: Server, pruned: Pipeline):
    image = random_image(50)
    first = server.chat(asking("what is it", image)).json()
    messages = [
        {"role": "user", "content": asking("what is it", image)},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "how many"},
    ]
    hits = server.metric("mm_cache_hits_total")
    second = server.client.post(CHAT, json={"messages": messages, "max_tokens": 8}).json()
    num_cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] <= num_cached < second["usage"]["prompt_tokens"]
    assert server.metric("mm_cache_hits_total") == hits + 1

    with serving(pruned.model, reuses_prefix=False) as fresh:
        again = fresh.client.post(CHAT, json={"messages": messages, "max_tokens": 8}).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert again["choices"] == second["choices"]


def test_another_image_shares_nothing(server: Server):
    first = server.chat(asking("what is it", random_image(60))).json()
    second = server.chat(asking("what is it", random_image(61))).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] < 6
    assert first["choices"][0]["message"] != second["choices"][0]["message"]


def test_api_keys_share_no_kv_cache(pruned: Pipeline):
    image = random_image(70)
    with serving(pruned.model, api_keys=("one", "two")) as server:

        def cached(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            found = server.client.post(CHAT, json=body(asking("what is it", image)), headers=headers).json()
            return found["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached("one"), cached("two")] == [0, 0]
        assert cached("one") > 0
        assert cached("two") > 0


def test_a_bundle_with_a_prefill_decoder_keeps_no_slots(prefill_bundle: Any):
    """Its two decoders round differently, so what was asked before would change an answer."""
    pipeline = load(prefill_bundle)
    with serving(pipeline.model) as server:
        for _ in range(2):
            usage = server.chat("how many dogs are there in the picture").json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    pipeline.close()


def test_a_checkpoint_in_transformers_is_served_as_well(pruned_bundle: Path, tiny_checkpoint: Path):
    pipeline = load(pruned_bundle, backend="transformers", checkpoint=tiny_checkpoint)
    questions = [make_question(number) for number in range(12)]
    expected = [alone(pipeline, text, images, **fields).text for text, images, fields in questions]
    with serving(pipeline.model, chunk_size=16) as server, ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(server.answer, asking(text, *images), **fields) for text, images, fields in questions]
        assert [answer.result() for answer in answers] == expected
    pipeline.close()
