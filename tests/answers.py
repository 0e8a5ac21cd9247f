"""What tests of answers share: requests one by one, answers that are the same, and what a decoder is fed with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hivtp import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp import HivtpError, Pipeline, Request


def alone(pipeline: Pipeline, request: Request) -> Answer:
    settings = {name: getattr(request, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
    return pipeline.generate(request.prompt, request.images, **settings)


def same(answer: Answer | HivtpError, single: Answer) -> bool:
    """Whether two answers differ in their timings only."""
    assert isinstance(answer, Answer), answer
    return replace(answer, timings=single.timings) == single


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


def greedy(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


def embeddings(length: int, seed: int = 0) -> NDArray[np.float32]:
    """Random ones of the tiny language model's width."""
    return np.random.default_rng(seed).normal(size=(length, 64)).astype(np.float32)
