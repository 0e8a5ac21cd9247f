"""What tests of answers share: requests one by one, answers that are the same, and what a decoder is fed with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hivtp import Answer
from hivtp.engines.onnxruntime import open_session
from hivtp.runtime.language.onnxruntime import LEAST_PROMPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp import HivtpError, Pipeline, Request
    from hivtp.engines.bundle import Bundle


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


def logits_of_a_growing_cache(bundle: Bundle, steps: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The decoders run plainly: every step gets the past of the one before as a new, longer array."""
    manifest = bundle.manifest.language
    decode = prefill = open_session(bundle.folder / manifest.decoder.file)
    if manifest.decoder.prefill_file is not None:
        prefill = open_session(bundle.folder / manifest.decoder.prefill_file)
    names = [output.name for output in decode.get_outputs()]
    empty = np.zeros((1, manifest.num_kv_heads, 0, manifest.head_size), np.float32)
    past = {
        f"past_key_values.{layer}.{kind}": empty for layer in range(manifest.num_layers) for kind in ("key", "value")
    }
    logits, length = [], 0
    for step in steps:
        length += len(step)
        mask = np.ones((1, length), np.int64)
        session = prefill if len(step) >= LEAST_PROMPT else decode
        outputs = session.run(names, {"inputs_embeds": step[None], "attention_mask": mask, **past})
        outputs = dict(zip(names, outputs, strict=True))
        logits.append(outputs["logits"][0, -1])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        assert past["past_key_values.0.key"].shape[2] == length
    return logits
