"""What a server does before it is ready, and when it has had nothing to do for long."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots
from hivtp.runtime.serving.flow import service as flow
from hivtp.runtime.serving.flow.warm_up import NUM_POSITIONS, NUM_TOKENS
from hivtp_ops.errors import EngineError
from tests.support.answers import load
from tests.support.serving import asking, random_image, serving, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline


def test_it_is_ready_when_the_first_request_has_nothing_more_to_wait_for(
    pruned_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    runs: list[int] = []
    prefill, step = OnnxRuntimeSlots.prefill, OnnxRuntimeSlots.step

    def noted_prefill(slots: Any, slot: int, embeds: Any, prompt_length: int) -> Any:
        runs.append(prompt_length)
        return prefill(slots, slot, embeds, prompt_length)

    def noted_step(slots: Any, *arguments: Any) -> Any:
        runs.append(1)
        return step(slots, *arguments)

    monkeypatch.setattr(OnnxRuntimeSlots, "prefill", noted_prefill)
    monkeypatch.setattr(OnnxRuntimeSlots, "step", noted_step)
    pipeline = load(pruned_bundle)
    with serving(pipeline.model) as server:
        assert runs == [NUM_POSITIONS, *[1] * (NUM_TOKENS - 1)]
        # The second form of the tokenizer is a copy of megabytes, made where words hold a special token.
        assert all("_renamed" in literals.__dict__ for literals in pipeline.model.tokenizer._literals.values())
        assert server.metric("mm_cache_queries_total") == server.metric("mm_cache_bytes") == 0
        assert server.metric("generation_tokens_total") == 0
        assert server.service.engine._scheduler._pool.num_kept_positions == 0
        expected = pipeline.generate("what is it", sampling=None)
        assert server.answer("what is it", max_tokens=256) == expected.text
    pipeline.close()


def test_until_then_it_lives_and_is_not_ready(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    may_go_on = threading.Event()
    monkeypatch.setattr(flow, "warm_up_model", lambda _model: may_go_on.wait(20))
    with serving(pruned.model, waits=False) as server:
        assert server.client.get("/health").status_code == 200
        response = server.client.get("/ready")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "the server is loading")
        # Whoever comes all the same is answered.
        assert server.chat("what is it").status_code == 200
        may_go_on.set()
        wait_for(lambda: server.client.get("/ready").status_code == 200)


@pytest.mark.parametrize("part", ["decoder", "images"])
def test_a_server_that_cannot_answer_is_never_ready(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, part: str):
    def failing(*_arguments: Any) -> Any:
        raise EngineError("broken")

    if part == "decoder":
        monkeypatch.setattr(OnnxRuntimeSlots, "prefill", failing)
    else:
        monkeypatch.setattr(type(pruned.model.images), "encode_anew", failing)
    with serving(pruned.model, waits=False) as server:
        wait_for(lambda: server.client.get("/health").status_code == 503)
        assert server.client.get("/ready").status_code == 503


def test_a_server_with_the_smallest_context_gets_ready(pruned: Pipeline):
    for max_context in (2, 5, NUM_POSITIONS + 1):
        with serving(pruned.model, max_context=max_context) as server:
            assert server.client.get("/ready").status_code == 200


def test_a_server_that_nobody_asks_gives_the_kv_cache_back(pruned: Pipeline):
    image = random_image(5)
    first = [{"role": "user", "content": asking("what is it", image)}]

    def ask(server: Any, messages: list[Any]) -> dict[str, Any]:
        return server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()

    def cached(answer: dict[str, Any]) -> int:
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    for idle_seconds, is_kept in ((60.0, True), (0.2, False)):
        with serving(pruned.model, idle_seconds=idle_seconds) as server:
            pool = server.service.engine._scheduler._pool
            answer = ask(server, first)
            if not is_kept:
                wait_for(lambda pool=pool: pool.num_kept_positions == 0)
            said = answer["choices"][0]["message"]["content"]
            turns = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "and where"}]
            assert (cached(ask(server, turns)) > 0) == is_kept


def test_the_lag_of_the_event_loop_is_measured(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow, "LAG_SECONDS", 0.01)
    with serving(pruned.model) as server:
        wait_for(lambda: server.metric("event_loop_lag_seconds_count") >= 10)
        before = server.metric("event_loop_lag_seconds_sum")
        loop = server.service.given_up.get_loop()
        loop.call_soon_threadsafe(lambda: threading.Event().wait(0.3))
        wait_for(lambda: server.metric("event_loop_lag_seconds_sum") > before + 0.2)
