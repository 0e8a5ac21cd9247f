"""What goes wrong inside: each request fails for itself, in words that tell nothing of the server."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.generation import Generation
from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots
from hivtp.runtime.language.scheduler import Scheduler
from hivtp_ops.errors import EngineError, OutOfMemoryError
from tests.support.serving import asking, random_image, serving, wait_for

if TYPE_CHECKING:
    from hivtp import Pipeline
    from tests.support.serving import Server

SECRET = "the decoder at /srv/secret broke"


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception, max_tokens: int = 17) -> None:
    """The request for `max_tokens` raises at this token, others do not."""
    choose = Generation.choose

    def failing(self: Any, logits: Any) -> int:
        if self.max_new_tokens == max_tokens and self.num_new_tokens == number:
            raise error
        return choose(self, logits)

    monkeypatch.setattr(Generation, "choose", failing)


@pytest.mark.parametrize("number", [1, 5])
def test_an_error_at_a_token_ends_the_stream_in_band(server: Server, monkeypatch: pytest.MonkeyPatch, number: int):
    expected = server.answer("how many dogs", max_tokens=16, ignore_eos=True)
    fail_at(monkeypatch, number, EngineError(SECRET))
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(server.answer, "how many dogs", max_tokens=16, ignore_eos=True) for _ in range(3)]
        response = server.chat("what is it", max_tokens=17, stream=True, ignore_eos=True)
        assert [other.result() for other in others] == [expected] * 3
    events = response.content.decode().split("\n\n")
    assert response.status_code == 200
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["code"] == "internal_error"
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    assert not any('"finish_reason":"' in event for event in events)


@pytest.mark.parametrize("streams", [True, False])
def test_an_error_before_the_first_token_has_a_status(server: Server, monkeypatch: pytest.MonkeyPatch, streams: bool):
    for error in (EngineError(SECRET), ValueError(SECRET), KeyError("x")):
        with monkeypatch.context() as patch:
            fail_at(patch, 0, error)
            response = server.chat("what is it", max_tokens=17, stream=streams)
        assert response.status_code == 500
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
    assert server.chat("what is it").status_code == 200


def test_memory_that_runs_out_is_worth_another_try(server: Server, monkeypatch: pytest.MonkeyPatch):
    for error in (MemoryError(), OutOfMemoryError(SECRET)):
        with monkeypatch.context() as patch:
            fail_at(patch, 0, error)
            response = server.chat("what is it", max_tokens=17)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "secret" not in response.text


def test_a_fault_of_the_vision_stage_is_of_its_request(server: Server, monkeypatch: pytest.MonkeyPatch):
    def failing(_encoder: Any, images: Any) -> Any:
        if images:
            raise EngineError(SECRET)
        return []

    monkeypatch.setattr(type(server.service.model.images), "encode", failing)
    response = server.chat(asking("what", random_image(90)))
    assert (response.status_code, "secret" in response.text) == (500, False)
    assert server.chat("what").status_code == 200


def test_a_fault_of_the_server_itself_has_no_details(server: Server, monkeypatch: pytest.MonkeyPatch):
    def failing(*_arguments: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("hivtp.runtime.serving.endpoints.version", failing)
    response = server.client.get("/version")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


def test_a_thread_that_dies_takes_the_server_out(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    step, is_broken = Scheduler.step, threading.Event()

    def dying(scheduler: Scheduler) -> bool:
        if is_broken.is_set():
            raise RuntimeError(SECRET)
        time.sleep(0.005)
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", dying)
    question = {"max_tokens": 400, "ignore_eos": True}
    with serving(pruned.model) as server, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(server.chat, "how many", **question)
        with server.open_stream("how many", **question) as response:
            lines = response.iter_lines()
            next(lines)
            wait_for(lambda: server.service.engine.state.num_running == 2)
            is_broken.set()
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert done == "data: [DONE]"
        whole = waiting.result()
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_dead")
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/ready").status_code == 503
        assert server.chat("what").json()["error"]["code"] == "engine_dead"
        assert server.client.get("/v1/models").status_code == 200


def test_a_full_house_refuses_with_a_time(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    choose = Generation.choose
    monkeypatch.setattr(Generation, "choose", lambda self, logits: time.sleep(0.02) or choose(self, logits))
    with serving(pruned.model, num_slots=1, max_queued=2) as server, ThreadPoolExecutor(3) as threads:
        server.answer("how many", max_tokens=100, ignore_eos=True)
        waiting = [threads.submit(server.chat, "how many", max_tokens=100, ignore_eos=True) for _ in range(3)]
        wait_for(lambda: server.service.admission.num_inside == 3)
        response = server.chat("what")
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        # Three answers of two seconds come before it.
        assert 3 <= int(response.headers["retry-after"]) <= 20
        assert server.client.get("/health").status_code == 200
        assert {answer.result().status_code for answer in waiting} == {200}
        assert server.metric("admission_rejections_total", code="queue_full") == 1


def test_the_bytes_that_wait_are_bounded(pruned: Pipeline):
    image = random_image(91, 300, 300, "BMP")
    with serving(pruned.model, max_waiting_bytes=len(image)) as server:
        response = server.chat(asking("what", image))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        server.wait_until_idle()
        assert server.service.admission.num_waiting_bytes == 0
        assert server.chat("what").status_code == 200


def test_a_request_waits_no_longer_than_it_may(pruned: Pipeline):
    with serving(pruned.model, num_slots=1, queue_seconds=0.2) as server, ThreadPoolExecutor(1) as threads:
        choose = Generation.choose
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Generation, "choose", lambda self, logits: time.sleep(0.02) or choose(self, logits))
            long = threads.submit(server.chat, "how many", max_tokens=60, ignore_eos=True)
            wait_for(lambda: server.service.engine.state.num_running == 1)
            for content in ("what", asking("what", random_image(92))):
                started = time.monotonic()
                response = server.chat(content)
                assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_timeout")
                assert time.monotonic() - started < 0.6
                assert int(response.headers["retry-after"]) >= 1
            assert long.result().status_code == 200


def test_a_prompt_that_runs_for_long_waits_for_nobody(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    prefill = OnnxRuntimeSlots.prefill
    with serving(pruned.model, queue_seconds=1) as server:
        monkeypatch.setattr(OnnxRuntimeSlots, "prefill", lambda *arguments: time.sleep(2) or prefill(*arguments))
        assert server.chat("what is it", max_tokens=2).status_code == 200
        assert server.metric("request_queue_time_seconds_sum") < 1


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_takes_no_longer_than_it_may(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, streams: bool):
    choose = Generation.choose
    monkeypatch.setattr(Generation, "choose", lambda self, logits: time.sleep(0.02) or choose(self, logits))
    with serving(pruned.model, request_seconds=0.5) as server:
        response = server.chat("how many", max_tokens=400, ignore_eos=True, stream=streams)
        if streams:
            found = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["error"]
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            found = response.json()["error"]
            assert response.status_code == 504
            assert response.headers["x-should-retry"] == "false"
        assert found["code"] == "request_timeout"
        server.wait_until_idle(2)


def test_a_stream_is_kept_alive(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    choose = Generation.choose
    monkeypatch.setattr(Generation, "choose", lambda self, logits: time.sleep(0.5) or choose(self, logits))
    with serving(pruned.model, keep_alive_seconds=0.1) as server:
        response = server.chat("how many", max_tokens=2, stream=True, ignore_eos=True)
        events = response.text.split("\n\n")
        # In the wait for the first token as well, after which the stream begins as it should.
        assert events[0] == ": keep-alive"
        assert events.count(": keep-alive") >= 4
        others = [event for event in events if event.startswith("data: {")]
        assert json.loads(others[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert len(server.stream("how many", max_tokens=2, ignore_eos=True)) >= 2


def test_a_prompt_that_is_too_long_is_counted(server: Server, pruned: Pipeline):
    response = server.chat("a " * 600)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "512" in error["message"]
    images = [random_image(seed) for seed in range(8)]
    assert server.chat(asking("a " * 250, *images)).json()["error"]["code"] == "context_length_exceeded"
    with serving(pruned.model, max_context=30) as small:
        assert small.chat("what " * 30).json()["error"]["code"] == "context_length_exceeded"
        whole = small.chat("what", max_tokens=100, ignore_eos=True).json()
        assert whole["usage"]["total_tokens"] == 30
        assert whole["choices"][0]["finish_reason"] == "length"
        # Without a number the answer takes what is left.
        found = small.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "what"}], "ignore_eos": True}
        ).json()
        assert found["usage"]["total_tokens"] == 30
    with serving(pruned.model, max_tokens=5) as capped:
        found = capped.chat("what", max_tokens=100, ignore_eos=True).json()
        assert found["usage"]["completion_tokens"] == 5
        assert capped.client.get("/v1/models").json()["data"][0]["max_tokens"] == 5
