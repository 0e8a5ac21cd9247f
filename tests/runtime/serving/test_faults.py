"""Faults of the machine around a server: memory, threads and clocks. Each costs the requests that it hits, at most."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from hivtp.engines.onnxruntime import OnnxRuntimeEngine
from hivtp.runtime.generation import Generation
from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots
from hivtp.runtime.serving.http.asgi import Call
from hivtp.runtime.serving.protocol import chat_request
from hivtp.runtime.serving.telemetry.logs import log, logging_to
from tests.support.serving import CHAT, asking, body, random_image, serving, wait_for
from tests.support.serving_process import children_of

if TYPE_CHECKING:
    from hivtp import Pipeline
    from tests.support.serving import Server

LONG = {"max_tokens": 30, "ignore_eos": True}


def no_memory(*_arguments: Any, **_keywords: Any) -> Any:
    raise MemoryError


def last_error(response: Any) -> dict[str, Any]:
    """The error of a stream, which ends as a stream should."""
    *_, error, done, rest = response.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return json.loads(error.removeprefix("data: "))["error"]


def test_memory_that_runs_out_in_a_joint_step_costs_the_request_that_needs_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    expected = server.answer("how many dogs", **LONG)
    step, begin = OnnxRuntimeSlots.step, Generation.begin
    victims: list[int] = []

    def noted_begin(generation: Any, num_cached: int) -> None:
        begin(generation, num_cached)
        if generation.max_new_tokens == 31:
            scheduler = server.service.engine._scheduler
            [sequence] = [one for one in scheduler._prefilling if one.request is generation]
            victims.append(sequence.slot)

    def failing(slots: Any, numbers: Any, embeds: Any) -> Any:
        if victims and victims[0] in numbers and slots.length(victims[0]) > 20:
            raise MemoryError
        return step(slots, numbers, embeds)

    monkeypatch.setattr(Generation, "begin", noted_begin)
    monkeypatch.setattr(OnnxRuntimeSlots, "step", failing)
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(server.answer, "how many dogs", **LONG) for _ in range(3)]
        response = server.chat("what is it", stream=True, **{**LONG, "max_tokens": 31})
        assert last_error(response)["code"] == "out_of_memory"
        assert [other.result() for other in others] == [expected] * 3
    assert len(victims) == 1


def test_memory_that_runs_out_everywhere_costs_what_is_in_flight(server: Server, monkeypatch: pytest.MonkeyPatch):
    expected = server.answer("how many dogs", **LONG)
    choose = Generation.choose
    monkeypatch.setattr(Generation, "choose", lambda self, logits: time.sleep(0.01) or choose(self, logits))
    with ThreadPoolExecutor(3) as threads:
        lost = [threads.submit(server.chat, "how many dogs", stream=True, **LONG) for _ in range(3)]
        wait_for(lambda: len(server.service.engine._scheduler._decoding) == 3)
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeSlots, "step", no_memory)
            assert {last_error(one.result())["code"] for one in lost} == {"out_of_memory"}
    server.wait_until_idle()
    assert server.answer("how many dogs", **LONG) == expected


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (OnnxRuntimeSlots, "prefill"),
        (OnnxRuntimeEngine, "run"),
        (Image, "open"),
        (Image.Image, "resize"),
        (chat_request, "parse_messages"),
        (Call, "_read"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("streams", [True, False])
def test_memory_that_runs_out_anywhere_is_worth_another_try(
    server: Server, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, streams: bool
):
    question = asking("what is it", random_image(77, 300, 200))
    with monkeypatch.context() as patch:
        if (owner, name) != (OnnxRuntimeSlots, "prefill"):
            server.service.model.images.cache.clear()
        patch.setattr(owner, name, no_memory)
        response = server.chat(question, stream=streams)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")
    assert int(response.headers["retry-after"]) >= 1
    assert server.chat(question, stream=streams).status_code == 200
    server.wait_until_idle()
    assert server.service.admission.num_waiting_bytes == 0


def test_a_template_process_that_dies_is_started_again(start: Any):
    server = start()

    def ask() -> httpx.Response:
        return httpx.post(server.url + CHAT, json=body("what is it"), timeout=60, trust_env=False)

    expected = ask().json()["choices"]
    [child] = children_of(server.process.pid)
    os.kill(child, signal.SIGKILL)
    answers = [ask() for _ in range(3)]
    assert [answer.json().get("choices") for answer in answers][1:] == [expected] * 2
    assert answers[0].status_code in (200, 500)
    assert children_of(server.process.pid) != [child]


class Disk:
    """A stream on a disk that is full for a while."""

    def __init__(self) -> None:
        self.is_full = False
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines.append(text)
        return len(text)

    def flush(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def test_a_full_disk_costs_lines_and_no_more(pruned: Pipeline):
    disk = Disk()
    with logging_to(disk, "json"), serving(pruned.model) as server:
        disk.is_full = True
        assert [server.chat("what is it").status_code for _ in range(5)] == [200] * 5
        # Neither does a value that cannot be written.
        log(logging.INFO, "odd", value=Unspeakable())
        disk.is_full = False
        wait_for(lambda: server.chat("what is it").status_code == 200 and disk.lines)
    lines = [json.loads(line) for line in disk.lines if line.strip()]
    assert lines[-1]["event"] == "request"
    assert lines[-1]["status"] == 200


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_clock_that_jumps_costs_nothing(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, hours: int):
    """Deadlines, times and metrics come from a clock that only goes forward; `created` alone is of the calendar."""
    now, now_ns, choose = time.time, time.time_ns, Generation.choose
    offset = [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + offset[0])
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(offset[0] * 1e9))

    def jumping(generation: Any, logits: Any) -> int:
        if generation.num_new_tokens == 5:
            offset[0] += hours * 3600
        return choose(generation, logits)

    with serving(pruned.model, queue_seconds=20, request_seconds=20, keep_alive_seconds=5) as server:
        expected = server.answer("how many", **LONG)
        monkeypatch.setattr(Generation, "choose", jumping)
        started = time.monotonic()
        found = server.stream("how many", **LONG)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == expected
        whole = server.chat("how many", **LONG).json()
        seconds = time.monotonic() - started
        assert whole["choices"][0]["message"]["content"] == expected
        # The second request began after the first had put the clock.
        assert abs(whole["created"] - (now() + hours * 3600)) < 60
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "inter_token_latency"):
            assert 0 <= server.metric(f"{name}_seconds_sum") < seconds + 60
        assert server.metric("request_success_total", finished_reason="length") == 3
        assert server.client.get("/ready").status_code == 200


def test_a_thread_of_a_stage_that_raises_what_no_one_foresaw_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch):
    """As a panic of a library written in Rust does, which is no Exception."""

    class Panic(BaseException):
        pass

    def panics(*_arguments: Any) -> Any:
        raise Panic("attempt to subtract with overflow")

    places: list[tuple[Any, str]] = [
        (OnnxRuntimeEngine, "run"),
        (type(server.service.model.template), "render"),
        (type(server.service.model.images), "prepare"),
        (chat_request, "parse_messages"),
    ]
    for number, (owner, name) in enumerate(places):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, panics)
            response = server.chat(asking("what", random_image(800 + number)))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error"), name
        assert "subtract" not in response.text
    assert server.chat(asking("what", random_image(900))).status_code == 200
    assert threading.active_count() < 60
