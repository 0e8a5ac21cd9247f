"""Requests one after the other: the images of the next are prepared while the present one is decoded."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from hivtp import Answer, Pipeline, Request
from hivtp.runtime import prefetch
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots
from hivtp_ops.errors import ContextLengthError, EngineError, ImageError, OutOfMemoryError, PromptError
from tests.support.answers import PHOTOS, alone, ask, load, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT = "What is in the picture?"
NUM_TOKENS = 12
TIMEOUT_S = 30


@pytest.fixture
def pipeline(varying_bundle: Path) -> Pipeline:
    """One of its own, whose stages a test may replace."""
    return load(varying_bundle)


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    pictures = [load_image(photos / name).resize((80, 60)) for name in PHOTOS]
    return [ask(PROMPT, [picture], NUM_TOKENS) for picture in pictures]


class Watched:
    """A stage that says when it begins."""

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
    watched = Watched(pipeline.model.images.encode)
    monkeypatch.setattr(pipeline.model.images, "encode", watched)
    return watched


@pytest.fixture
def before_run(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[int, int], None]]:
    """Functions that are called with the number of the request and that of its run, before the decoder runs."""
    functions: list[Callable[[int, int], None]] = []
    numbers = {"request": -1, "run": -1}
    prefill, step = OnnxRuntimeSlots.prefill, OnnxRuntimeSlots.step

    def called() -> None:
        for function in functions:
            function(numbers["request"], numbers["run"])

    def watched_prefill(self: OnnxRuntimeSlots, *arguments: Any) -> Any:
        numbers.update(request=numbers["request"] + 1, run=0)
        called()
        return prefill(self, *arguments)

    def watched_step(self: OnnxRuntimeSlots, *arguments: Any) -> Any:
        numbers["run"] += 1
        called()
        return step(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeSlots, "prefill", watched_prefill)
    monkeypatch.setattr(OnnxRuntimeSlots, "step", watched_step)
    return functions


def test_answers_are_those_that_each_request_gets_alone(pipelines: dict[str, Pipeline], requests: list[Request]):
    more = [
        ask("how many dogs", (), 1),
        ask("Is <image> brighter than <image>?", [requests[0].images[0], requests[3].images[0]], NUM_TOKENS),
        ask(PROMPT, requests[1].images, 9, temperature=1.0, seed=3),
    ]
    for pipeline in pipelines.values():
        answers = list(pipeline.generate_each(iter(requests + more)))
        for answer, request in zip(answers, requests + more, strict=True):
            assert same(answer, alone(pipeline, request))


def test_no_requests_have_no_answers(pipeline: Pipeline):
    assert list(pipeline.generate_each([])) == []


def test_the_next_images_are_encoded_while_the_answer_is_decoded(pipeline, requests, vision, before_run):
    """The decoder waits after its first token until the vision stage of the next request has begun."""
    begun_in_time = []

    def wait_for_the_next(request: int, run: int) -> None:
        if run == 1 and request + 1 < len(requests):
            begun_in_time.append(vision.begun[request + 1].wait(TIMEOUT_S))

    before_run.append(wait_for_the_next)
    assert len(list(pipeline.generate_each(requests))) == len(requests)
    assert begun_in_time == [True] * (len(requests) - 1)


def test_the_prefill_has_the_machine_for_itself(pipeline, requests, vision, before_run):
    """The next request is not begun before the first token."""
    calls_at_prefill = []
    before_run.append(lambda _request, run: run == 0 and calls_at_prefill.append(vision.num_calls))
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


def test_a_request_that_fails_costs_no_other(pipeline, requests, before_run):
    def fail_at_times(request: int, run: int) -> None:
        if request == 1:
            raise EngineError("no prefill")
        if (request, run) == (2, 4):
            raise MemoryError("no room")

    expected = alone(pipeline, requests[0])
    # The one above was request 0.
    before_run.append(lambda request, run: fail_at_times(request - 1, run))
    mixed = [
        requests[0],
        Request(PROMPT, [b"no picture"]),
        requests[1],
        "no request",
        requests[2],
        Request("a " * 600, ()),
        requests[0],
    ]
    answers = list(pipeline.generate_each(mixed))
    kinds = [Answer, ImageError, EngineError, PromptError, OutOfMemoryError, ContextLengthError, Answer]
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
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("hivtp-prefetch")]

    pictures = [request.images[0].copy() for request in requests]
    watched = [weakref.ref(picture) for picture in pictures]
    answers = pipeline.generate_each(ask(PROMPT, [pictures.pop(0)], NUM_TOKENS) for _ in range(len(pictures)))
    next(answers)
    assert vision.begun[1].wait(TIMEOUT_S)
    assert len(threads()) == 1
    answers.close()
    assert threads() == []
    gc.collect()
    assert [picture() is None for picture in watched] == [True, True, False, False, False]
    assert list(answers) == []
    exhausted = pipeline.generate_each(requests[:1])
    assert len(list(exhausted)) == 1
    assert threads() == []


def test_what_is_prefetched_holds_no_pixels(pipeline, requests, before_run):
    """Of a request that waits for the present one, its images are encoded, and their pixels are given back."""
    held: list[weakref.ref[Any]] = []
    prepare = pipeline.model.images.prepare

    def watched(image: Any, num_images: int) -> Any:
        prepared = prepare(image, num_images)
        held.append(weakref.ref(prepared.pixel_values))
        return prepared

    encoded = [threading.Event() for _ in requests]
    numbers = count()
    encode = pipeline.model.encode
    pipeline.model.images.prepare = watched
    pipeline.model.encode = lambda prompt: (encode(prompt), encoded[next(numbers)].set())[0]
    found = []

    def look(request: int, run: int) -> None:
        if run == 3 and request + 1 < len(requests):
            assert encoded[request + 1].wait(TIMEOUT_S)
            # The thread may still be on its way out of the stage.
            for _ in range(1000):
                if held[request + 1]() is None:
                    break
                threading.Event().wait(0.001)
            found.append([pixels() is None for pixels in held[: request + 2]])

    before_run.append(look)
    list(pipeline.generate_each(requests))
    assert found == [[True] * number for number in range(2, len(requests) + 1)]


def test_images_enter_the_cache(pipeline, requests):
    answers = list(pipeline.generate_each([requests[0], requests[1], requests[0]]))
    assert len(pipeline.model.images.cache) == 2
    assert same(answers[2], answers[0])


def test_times_are_those_of_the_stages_and_waiting_is_in_the_first_token(pipeline, requests, monkeypatch, before_run):
    """A clock that the stages themselves put forward, so that no machine is too slow for it."""
    now, lock = [0.0], threading.Lock()

    def pass_time(seconds: float) -> None:
        with lock:
            now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    images = pipeline.model.images
    prepare, encode = images.prepare, images.encode
    encoded = [threading.Event() for _ in requests]
    decoding = [threading.Event() for _ in requests]
    numbers, places = count(), count()

    def prepared(image: Any, num_images: int) -> Any:
        # The stages of a request pass while the one before it decodes.
        place = next(places)
        assert place == 0 or decoding[place - 1].wait(TIMEOUT_S)
        pass_time(3)
        return prepare(image, num_images)

    def prefetched(*parts: Any) -> prefetch.Prefetched[Any]:
        # All of its times have been read by now.
        encoded[next(numbers)].set()
        return taken(*parts)

    def run_time(request: int, run: int) -> None:
        if run == 1 and request + 1 < len(requests):
            decoding[request].set()
            assert encoded[request + 1].wait(TIMEOUT_S)
        pass_time(7 if run == 0 else 1)

    taken = prefetch.Prefetched
    monkeypatch.setattr(prefetch, "Prefetched", prefetched)
    monkeypatch.setattr(images, "prepare", prepared)
    monkeypatch.setattr(images, "encode", lambda several: (pass_time(5), encode(several))[1])
    before_run.append(run_time)

    def source() -> Iterator[Request]:
        # Before there is a request, nobody waits for its answer.
        pass_time(2)
        yield from requests

    timings = [answer.timings for answer in pipeline.generate_each(source())]
    assert [each.preprocess_ms for each in timings] == [3000] * 5
    assert [each.vision_ms for each in timings] == [5000] * 5
    assert [each.prefill_ms for each in timings] == [7000] * 5
    # Each of the eleven steps took a second; in the first of them the stages of the next request passed, eight seconds.
    assert [each.decode_ms_per_token for each in timings] == [19000 / 11] * 4 + [1000]
    # The first one waits for its own image; the others find theirs ready.
    assert [each.ttft_ms for each in timings] == [15000] + [7000] * 4


@pytest.mark.gpu
def test_on_a_gpu_answers_are_those_of_each_alone(varying_bundle: Path, requests: list[Request]):
    from hivtp import VisionOptions

    pipeline = Pipeline.load(varying_bundle, vision=VisionOptions("onnxruntime-cuda", cache_bytes=0))
    expected = [alone(pipeline, request) for request in requests]
    for answer, single in zip(pipeline.generate_each(requests), expected, strict=True):
        assert same(answer, single)
