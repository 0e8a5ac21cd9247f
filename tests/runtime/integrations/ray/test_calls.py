"""A call that is handed to an app in another process: its answer comes in parts, and its end is noticed."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from hivtp.runtime.integrations.ray.calls import Head, HttpCall, answer_call
from hivtp.runtime.integrations.ray.vision import VisionReplica, num_tiles
from hivtp.runtime.serving.app import create_app
from hivtp.runtime.serving.settings import ServerSettings
from tests.support.serving import asking, body, random_image, wait_for

HEADERS = ((b"host", b"127.0.0.1"), (b"content-type", b"application/json"))


def chat(**fields) -> HttpCall:
    content = json.dumps(body(asking("what is this?", random_image(1)), **fields)).encode()
    headers = (*HEADERS, (b"content-length", str(len(content)).encode()))
    return HttpCall("POST", "/v1/chat/completions", b"", headers, content, ("127.0.0.1", 1))


def in_app(model, use, **settings):
    """Run a coroutine with a server that has started."""

    async def run():
        app = create_app(model, ServerSettings(**settings))
        await app.service.start()
        try:
            return await use(app)
        finally:
            await app.service.stop()

    return asyncio.run(run())


async def collected(app, call):
    head, *parts = [part async for part in answer_call(app, call)]
    return head, b"".join(parts)


def test_answers_and_errors_pass_as_they_are(pruned):
    async def use(app):
        head, content = await collected(app, chat())
        assert head.status == 200
        assert not head.is_stream
        assert json.loads(content)["choices"][0]["message"]["content"]
        head, content = await collected(app, HttpCall("GET", "/nowhere", b"", HEADERS, b""))
        assert head.status == 404
        assert json.loads(content)["error"]["code"] == "not_found"

    in_app(pruned.model, use)


def test_a_stream_comes_part_by_part(pruned):
    async def use(app):
        parts = [part async for part in answer_call(app, chat(stream=True))]
        assert isinstance(parts[0], Head)
        assert parts[0].is_stream
        assert len(parts) > 3
        assert parts[-1].endswith(b"data: [DONE]\n\n")

    in_app(pruned.model, use)


def test_whoever_stops_reading_frees_the_slot(pruned):
    async def use(app):
        parts = answer_call(app, chat(stream=True, max_tokens=300, ignore_eos=True))
        await anext(parts)
        await anext(parts)
        await parts.aclose()
        await asyncio.to_thread(wait_for, lambda: app.service.engine.state.num_running == 0)
        assert app.service.admission.num_inside == 0

    in_app(pruned.model, use, num_slots=1)


def test_what_an_app_raises_is_raised():
    async def broken(_scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("broken")

    async def use():
        return [part async for part in answer_call(broken, chat())]

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(use())


class _Doubling:
    """An engine that notes how many tiles each run has."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, inputs):
        self.runs.append(len(inputs["pixel_values"]))
        return {"double": inputs["pixel_values"] * 2}


def test_tiles_of_several_requests_run_together():
    vision = object.__new__(VisionReplica)
    vision._engine = _Doubling()
    requests = [{"pixel_values": np.full((tiles, 3), tiles, np.float32)} for tiles in (1, 5, 2)]
    assert num_tiles(requests) == 8
    found = vision.run(requests)
    assert vision._engine.runs == [8]
    for request, answer in zip(requests, found, strict=True):
        np.testing.assert_array_equal(answer["double"], request["pixel_values"] * 2)
