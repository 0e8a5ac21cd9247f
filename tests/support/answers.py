"""What tests of answers share: requests one by one, and answers that are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hivtp import Answer, LanguageOptions, Pipeline, Request, SamplingParams, VisionOptions
from hivtp.runtime.vision.options import CACHE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from hivtp import HivtpError

# Of all photographs that tests ask about.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")


def load(bundle: Path, *, engine: str = "auto", cache_bytes: int = CACHE_BYTES, **language: Any) -> Pipeline:
    """A pipeline with one thread: more cost models this small more than they give."""
    vision = VisionOptions(engine, num_threads=1, cache_bytes=cache_bytes)
    return Pipeline.load(bundle, vision=vision, language=LanguageOptions(num_threads=1, **language))


def with_language(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """The same bundle, whose manifest says something else of its language model."""
    loaded = load(pipeline.model.bundle.folder)
    manifest = loaded.model.bundle.manifest
    manifest = replace(manifest, language=replace(manifest.language, **changes))
    loaded.model.bundle = replace(loaded.model.bundle, manifest=manifest)
    return loaded


def at_most(number: int, **settings: Any) -> SamplingParams:
    """At most this many tokens."""
    return SamplingParams(max_new_tokens=number, **settings)


def ask(prompt: str, images: Sequence[Any] = (), number: int = 8, **settings: Any) -> Request:
    """A request for at most this many tokens."""
    return Request(prompt, images, at_most(number, **settings))


def alone(pipeline: Pipeline, request: Request) -> Answer:
    return pipeline.generate(request)


def same(answer: Answer | HivtpError, single: Answer) -> bool:
    """Whether two answers differ in their timings and in what computed them only."""
    assert isinstance(answer, Answer), answer
    return replace(answer, timings=single.timings, ran=single.ran) == single


def assert_same_alone(pipeline: Pipeline, reference: Pipeline, requests: Sequence[Request]) -> None:
    """Two pipelines answer each request alike, and all but one of them differently."""
    answers = [alone(pipeline, request) for request in requests]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers) - 1
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(reference, request))


def assert_same_together(pipeline: Pipeline, reference: Pipeline, requests: Sequence[Request]) -> None:
    """Two pipelines answer a batch alike."""
    expected = reference.generate_batch(requests)
    for answer, single in zip(pipeline.generate_batch(requests), expected, strict=True):
        assert same(answer, single)
