"""One pipeline in several threads: every answer is the one that it gives alone."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest

from hivtp import Answer, HivtpError, Pipeline, Request
from tests.support.answers import ask, at_most, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
NUM_TOKENS = 10
NUM_THREADS = 6


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Between nearly any two instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=["onnxruntime", "two decoders", "transformers"])
def pipeline(
    request: pytest.FixtureRequest, varying_bundle: Path, prefill_bundle: Path, tiny_checkpoint: Path
) -> Pipeline:
    """With a cache that holds two of the four pictures, so that threads drop each other's entries."""
    options = {"backend": "transformers", "checkpoint": tiny_checkpoint} if request.param == "transformers" else {}
    bundle = prefill_bundle if request.param == "two decoders" else varying_bundle
    return load(bundle, cache_bytes=40_000, **options)


def generate(pipeline: Pipeline, files: list[Path]) -> list[list[int]]:
    return [pipeline.generate("What is it?", [file], at_most(NUM_TOKENS)).token_ids for file in files]


def generate_each(pipeline: Pipeline, files: list[Path]) -> list[list[int]]:
    return [answer.token_ids for answer in pipeline.generate_each(ask("where", [file], NUM_TOKENS) for file in files)]


def stream_in_turn(pipeline: Pipeline, files: list[Path]) -> list[list[int]]:
    """Several streams of one thread, a piece of each at a time, and one that is given up."""
    streams = [pipeline.stream("how many", [file], at_most(NUM_TOKENS)) for file in files]
    next(pipeline.stream("how many", files[:1], at_most(NUM_TOKENS)))
    open_streams = list(streams)
    while open_streams:
        open_streams = [stream for stream in open_streams if next(stream, None) is not None]
    return [stream.answer.token_ids for stream in streams]


def batch(pipeline: Pipeline, files: list[Path]) -> list[list[int]]:
    requests = [ask("what <image> or <image>", [file, files[0]], NUM_TOKENS) for file in files]
    requests.append(ask("how many dogs", (), 4, temperature=1.0, seed=3))
    return [answer.token_ids for answer in pipeline.generate_batch(requests)]


def chat(pipeline: Pipeline, files: list[Path]) -> list[list[int]]:
    conversation = pipeline.chat()
    turns = [("what is it", files[:1]), ("how many", []), ("and <image>", files[1:2])]
    return [conversation.ask(prompt, images, at_most(5)).token_ids for prompt, images in turns]


KINDS = (generate, generate_each, stream_in_turn, batch, chat)


def test_answers_of_all_kinds_are_those_of_one_thread(pipeline: Pipeline, photos: Path) -> None:
    files = [photos / name for name in PHOTOS]
    tasks: list[tuple[Callable[[Pipeline, list[Path]], list[list[int]]], list[Path]]] = [
        (kind, files[shift:] + files[:shift]) for shift in range(3) for kind in KINDS
    ]
    expected = [kind(pipeline, order) for kind, order in tasks]
    barrier = Barrier(NUM_THREADS)

    def run(first: int) -> list[tuple[int, list[list[int]]]]:
        barrier.wait()
        mine = range(first, len(tasks), NUM_THREADS)
        return [(index, tasks[index][0](pipeline, tasks[index][1])) for index in mine]

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        found = [result for results in threads.map(run, range(NUM_THREADS)) for result in results]
    assert sorted(found) == list(enumerate(expected))
    cache = pipeline.model.images.cache
    assert 0 < cache.num_bytes == sum(image.num_bytes for image in cache._entries.values()) <= cache.max_bytes
    assert len(cache) < len(PHOTOS)


def test_a_failing_thread_disturbs_no_other(pipeline: Pipeline, photos: Path) -> None:
    files = [photos / name for name in PHOTOS]
    expected = generate(pipeline, files)

    def fail(_number: int) -> int:
        bad = ["no request", Request("a " * 600), Request("what", [b"words"]), Request("what", [files[0] / "absent"])]
        return sum(isinstance(answer, Exception) for answer in pipeline.generate_batch(bad))

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        failures = [threads.submit(fail, number) for number in range(8)]
        answers = [threads.submit(generate, pipeline, files) for _ in range(3)]
        assert [failure.result() for failure in failures] == [4] * 8
        assert [answer.result() for answer in answers] == [expected] * 3


def test_a_pipeline_that_is_closed_meanwhile_ends_every_answer_or_says_so(varying_bundle: Path, photos: Path) -> None:
    pipeline, files = load(varying_bundle, cache_bytes=0), [photos / name for name in PHOTOS]
    expected = generate(pipeline, files)
    barrier = Barrier(NUM_THREADS)

    def use(_number: int) -> list[Answer | HivtpError]:
        barrier.wait()
        results: list[Answer | HivtpError] = []
        while not results or isinstance(results[-1], Answer):
            results += pipeline.generate_batch([ask("What is it?", [file], NUM_TOKENS) for file in files])
        return results

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        uses = [threads.submit(use, number) for number in range(NUM_THREADS - 1)]
        barrier.wait()
        time.sleep(0.3)
        pipeline.close()
        results = [result for used in uses for result in used.result()]
    for number, result in enumerate(results):
        if isinstance(result, Answer):
            assert result.token_ids == expected[number % len(files)]
        else:
            assert str(result) == "this pipeline is closed; load the bundle again"
