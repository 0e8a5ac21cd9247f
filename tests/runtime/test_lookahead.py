"""Requests one after the other: the pictures of the next are prepared while the present one is decoded."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from hivtp.runtime.lookahead import Taken

from hivtp import Answer, Pipeline, Request
from hivtp.runtime import lookahead
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import EngineError, ImageError, OutOfMemoryError, PromptError
from tests.support.answers import alone, same

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")
PROMPT = "What is in the picture?"
NUM_TOKENS = 12
TIMEOUT_S = 30


@pytest.fixture
def pipeline(varying_bundle: Path) -> Pipeline:
    """One of its own, whose stages a test may replace."""
    return Pipeline.load(varying_bundle, num_threads=1)


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    pictures = [load_image(photos / name).resize((80, 60)) for name in PHOTOS]
    return [Request(PROMPT, [picture], NUM_TOKENS) for picture in pictures]


class Watched:
    """A stage that says when it begins, and may be held up there."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.num_calls = 0
        self.begun = [threading.Event() for _ in range(20)]

    def __call__(self, *arguments: Any) -> Any:
        self.num_calls += 1
        self.begun[self.num_calls - 1].set()
        return self._function(*arguments)


@pytest.fixture
def vision(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(pipeline.images.encode)
    monkeypatch.setattr(pipeline.images, "encode", watched)
    return watched


def watch_decoding(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, at_token: Any) -> None:
    """Call `at_token` with the number of each token before the decoder goes on to the next."""
    generate = pipeline.language.generate

    def watched(*arguments: Any) -> Iterator[int]:
        for number, token_id in enumerate(generate(*arguments)):
            yield token_id
            at_token(number)

    monkeypatch.setattr(pipeline.language, "generate", watched)


def test_answers_are_those_that_each_request_gets_alone(pipelines: dict[str, Pipeline], requests: list[Request]):
    more = [
        Request("how many dogs", (), 1),
        Request("Is <image> brighter than <image>?", [requests[0].images[0], requests[3].images[0]], NUM_TOKENS),
        Request(PROMPT, requests[1].images, 9, temperature=1.0, seed=3),
    ]
    for pipeline in pipelines.values():
        answers = list(pipeline.generate_each(iter(requests + more)))
        for answer, request in zip(answers, requests + more, strict=True):
            assert same(answer, alone(pipeline, request))


def test_no_requests_have_no_answers(pipeline: Pipeline):
    assert list(pipeline.generate_each([])) == []


def test_the_next_pictures_are_encoded_while_the_answer_is_decoded(pipeline, requests, vision, monkeypatch):
    """The decoder waits at its first token until the vision stage of the next request has begun."""
    begun_in_time = []
    numbers = count(1)

    def wait_for_the_next(token: int) -> None:
        if token == 0 and (number := next(numbers)) < len(requests):
            begun_in_time.append(vision.begun[number].wait(TIMEOUT_S))

    watch_decoding(pipeline, monkeypatch, wait_for_the_next)
    assert len(list(pipeline.generate_each(requests))) == len(requests)
    assert begun_in_time == [True] * (len(requests) - 1)


def test_the_prefill_has_the_machine_for_itself(pipeline, requests, vision, monkeypatch):
    """The next request is not begun before the first token."""
    calls_at_prefill = []
    generate = pipeline.language.generate

    def watched(*arguments: Any) -> Iterator[int]:
        calls_at_prefill.append(vision.num_calls)
        yield from generate(*arguments)

    monkeypatch.setattr(pipeline.language, "generate", watched)
    list(pipeline.generate_each(requests))
    assert calls_at_prefill == [1, 2, 3, 4, 5]


def test_one_request_is_taken_ahead_and_no_more(pipeline, requests, vision):
    taken: list[int] = []

    def source() -> Iterator[Request]:
        for number, request in enumerate(requests):
            taken.append(number)
            yield request

    answers = pipeline.generate_each(source())
    assert taken == []
    for number in range(len(requests)):
        next(answers)
        if number + 1 < len(requests):
            assert vision.begun[number + 1].wait(TIMEOUT_S)
        # Whatever the thread still did, it may not have gone on to the one after.
        assert taken == list(range(min(number + 2, len(requests))))
    assert list(answers) == []


def test_a_request_that_fails_costs_no_other(pipeline, requests, monkeypatch):
    generate, starts = pipeline.language.generate, count()

    def fail_at_times(*arguments: Any) -> Iterator[int]:
        start = next(starts)
        for number, token_id in enumerate(generate(*arguments)):
            if start == 1:
                raise EngineError("no prefill")
            if start == 2 and number == 3:
                raise MemoryError("no room")
            yield token_id

    expected = alone(pipeline, requests[0])
    monkeypatch.setattr(pipeline.language, "generate", fail_at_times)
    mixed = [
        requests[0],
        Request(PROMPT, [b"no picture"]),
        requests[1],
        "no request",
        requests[2],
        Request("", ()),
        Request("a " * 600, ()),
        requests[0],
    ]
    answers = list(pipeline.generate_each(mixed))
    kinds = [Answer, ImageError, EngineError, PromptError, OutOfMemoryError, PromptError, PromptError, Answer]
    assert [type(answer) for answer in answers] == kinds
    assert same(answers[0], expected)
    assert same(answers[-1], expected)


def test_what_iterating_the_requests_raises_comes_in_its_place(pipeline, requests):
    def source() -> Iterator[Request]:
        yield requests[0]
        raise ConnectionError("the client has left")

    answers = pipeline.generate_each(source())
    assert isinstance(next(answers), Answer)
    with pytest.raises(ConnectionError, match="the client has left"):
        next(answers)
    assert list(answers) == []


@pytest.mark.parametrize("requests", ["What?", b"What?", 3, Request("What?")])
def test_what_cannot_be_iterated_is_refused_at_once(pipeline, requests):
    with pytest.raises(PromptError, match=f"must be an iterable of Request, not {type(requests).__name__}"):
        pipeline.generate_each(requests)


def test_closing_stops_the_thread_and_frees_memory(pipeline, requests, vision):
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("hivtp-lookahead")]

    class Own(list[Any]):
        """A list that can be referred to weakly."""

    sources = [Own(request.images) for request in requests]
    watched = [weakref.ref(images) for images in sources]
    answers = pipeline.generate_each(Request(PROMPT, sources.pop(0), NUM_TOKENS) for _ in range(len(sources)))
    next(answers)
    assert vision.begun[1].wait(TIMEOUT_S)
    assert len(threads()) == 1
    answers.close()
    assert threads() == []
    gc.collect()
    assert [images() is None for images in watched] == [True, True, False, False, False]
    assert list(answers) == []
    exhausted = pipeline.generate_each(requests[:1])
    assert len(list(exhausted)) == 1
    assert threads() == []


def test_pictures_enter_the_cache(pipeline, requests):
    answers = list(pipeline.generate_each([requests[0], requests[1], requests[0]]))
    cache = pipeline.images._cache
    assert len(cache) == 2
    assert same(answers[2], answers[0])


def test_times_are_those_of_the_stages_and_waiting_is_in_the_first_token(pipeline, requests, monkeypatch):
    """A clock that the stages themselves put forward, so that no machine is too slow for it."""
    now, lock = [0.0], threading.Lock()

    def pass_time(seconds: float) -> None:
        with lock:
            now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    prepare, encode = pipeline.images.prepare, pipeline.images.encode
    encoded = [threading.Event() for _ in requests]
    numbers = count()

    def taken(*parts: Any) -> Taken:
        # All of its times have been read by now.
        encoded[next(numbers)].set()
        return Taken(*parts)

    def slow_prepare(image: Any) -> Any:
        pass_time(3)
        return prepare(image)

    def slow_encode(images: Any) -> Any:
        pass_time(5)
        return encode(images)

    generate, starts = pipeline.language.generate, count(1)

    def slow_generate(*arguments: Any) -> Iterator[int]:
        number = next(starts)
        pass_time(7)
        for token, token_id in enumerate(generate(*arguments)):
            yield token_id
            if token == 0 and number < len(requests):
                assert encoded[number].wait(TIMEOUT_S)
            pass_time(1)

    monkeypatch.setattr(lookahead, "Taken", taken)
    monkeypatch.setattr(pipeline.images, "prepare", slow_prepare)
    monkeypatch.setattr(pipeline.images, "encode", slow_encode)
    monkeypatch.setattr(pipeline.language, "generate", slow_generate)
    timings = [answer.timings for answer in pipeline.generate_each(requests)]
    assert [each.preprocess_ms for each in timings] == [3000] * 5
    assert [each.vision_ms for each in timings] == [5000] * 5
    assert [each.prefill_ms for each in timings] == [7000] * 5
    # The first one waits for its own picture; the others find theirs ready.
    assert [each.ttft_ms for each in timings] == [15000] + [7000] * 4


@pytest.mark.gpu
def test_on_a_gpu_answers_are_those_of_each_alone(varying_bundle: Path, requests: list[Request]):
    pipeline = Pipeline.load(varying_bundle, engine="onnxruntime-cuda", image_cache_bytes=0)
    expected = [alone(pipeline, request) for request in requests]
    for answer, single in zip(pipeline.generate_each(requests), expected, strict=True):
        assert same(answer, single)
