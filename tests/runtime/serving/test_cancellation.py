"""A client that leaves, wherever its request is: its slot is free within one run, and no other answer suffers."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.generation import Generation
from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots
from tests.support.serving import CHAT, asking, body, random_image, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp import Pipeline
    from tests.support.serving import Server


class Brake:
    """Holds something up until it is let go."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.is_free = threading.Event()

    def __call__(self) -> None:
        self.is_reached.set()
        self.is_free.wait(30)


@pytest.fixture
def brake() -> Iterator[Brake]:
    found = Brake()
    yield found
    found.is_free.set()


def send(server: Server, content: Any, **fields: Any) -> socket.socket:
    """A request whose client can leave at any time."""
    connection = server.raw()
    content = json.dumps(body(content, **fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


STREAMED = pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])


@STREAMED
def test_while_it_decodes(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, streams: bool):
    choose = Generation.choose

    def slow(self: Generation, logits: Any) -> int:
        time.sleep(0.01)
        return choose(self, logits)

    with serving(pruned.model) as server:
        expected = server.answer("how many dogs", max_tokens=60)
        monkeypatch.setattr(Generation, "choose", slow)
        connection = send(server, "what is it", max_tokens=400, ignore_eos=True, stream=streams)
        wait_for(lambda: server.service.engine.state.num_running == 1)
        other: list[str] = []
        thread = threading.Thread(target=lambda: other.append(server.answer("how many dogs", max_tokens=60)))
        thread.start()
        wait_for(lambda: server.service.engine.state.num_running == 2)
        started = time.monotonic()
        connection.close()
        wait_for(lambda: server.service.engine.state.num_running <= 1)
        # The answer that was given up would have taken four seconds.
        assert time.monotonic() - started < 1
        thread.join()
        assert other == [expected]
        server.wait_until_idle()
        assert server.metric("request_failures_total", code="client_gone") == 1


@STREAMED
def test_while_it_is_prefilled(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, brake: Brake, streams: bool):
    """Between two chunks of its prompt."""
    sizes: list[int] = []
    prefill = OnnxRuntimeSlots.prefill

    def held(self: OnnxRuntimeSlots, slot: int, embeds: Any, prompt_length: int) -> Any:
        if len(embeds) == 4:
            sizes.append(slot)
            brake()
        return prefill(self, slot, embeds, prompt_length)

    monkeypatch.setattr(OnnxRuntimeSlots, "prefill", held)
    with serving(pruned.model, chunk_size=4, steps_per_chunk=1) as server:
        long = threading.Thread(target=server.chat, args=["how"], kwargs={"max_tokens": 480, "ignore_eos": True})
        long.start()
        wait_for(lambda: server.service.engine.state.num_running == 1)
        connection = send(server, "what is it " * 20, stream=streams)
        assert brake.is_reached.wait(10)
        connection.close()
        wait_for(lambda: server.service.admission.num_inside == 1)
        brake.is_free.set()
        long.join()
        server.wait_until_idle()
        assert len(sizes) == 1


@STREAMED
def test_while_its_images_are_encoded(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, brake: Brake, streams: bool):
    encoded: list[int] = []
    encode = type(pruned.model).encode_images

    def held(model: Any, images: Any) -> Any:
        encoded.append(len(images))
        brake()
        return encode(model, images)

    monkeypatch.setattr(type(pruned.model), "encode_images", held)
    with serving(pruned.model) as server:
        connection = send(server, asking("what", *(random_image(seed) for seed in range(80, 84))), stream=streams)
        assert brake.is_reached.wait(10)
        connection.close()
        wait_for(lambda: server.service.admission.num_inside == 0)
        brake.is_free.set()
        monkeypatch.undo()
        assert server.chat(asking("what", random_image(85))).status_code == 200
        # Of its four images one was on its way.
        assert encoded == [1]


@STREAMED
def test_while_it_waits_for_a_slot(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch, streams: bool):
    begun: list[int] = []
    begin = Generation.begin

    def noted(self: Generation, num_cached: int) -> None:
        begun.append(num_cached)
        begin(self, num_cached)

    monkeypatch.setattr(Generation, "begin", noted)
    with serving(pruned.model, num_slots=1) as server:
        first = send(server, "how many", max_tokens=480, ignore_eos=True)
        wait_for(lambda: server.service.engine.state.num_running == 1)
        second = send(server, "what is it", stream=streams)
        wait_for(lambda: server.service.engine.state.num_waiting == 1)
        second.close()
        wait_for(lambda: server.service.engine.state.num_waiting == 0)
        assert server.service.engine.state.num_running == 1
        first.close()
        server.wait_until_idle()
        assert len(begun) == 1
        assert server.answer("how many dogs") == server.answer("how many dogs")


def test_before_its_body_was_sent(pruned: Pipeline):
    with serving(pruned.model) as server:
        connection = server.raw()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 1000\r\n\r\n{{".encode())
        wait_for(lambda: server.service.admission.num_waiting_bytes > 0)
        connection.close()
        wait_for(lambda: server.service.admission.num_waiting_bytes == 0)
        assert server.chat("what").status_code == 200


def test_a_client_that_stops_reading_is_given_up_at_the_deadline(pruned: Pipeline):
    """It keeps its connection, so that nothing but the time tells."""
    with serving(pruned.model, request_seconds=1.0) as server:
        connection = server.raw()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        fields = {"max_tokens": 450, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
        content = json.dumps(body("how many", **fields)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: server.service.admission.num_inside == 1)
        server.wait_until_idle(20)
        connection.close()
