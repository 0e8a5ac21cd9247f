"""A bundle with a second decoder, which runs the prompts."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp import Pipeline, Request
from hivtp.engines.base import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.language import create_language, onnxruntime
from hivtp.runtime.language.kv_cache import BoundRows
from hivtp.runtime.language.onnxruntime import LEAST_PROMPT
from hivtp_ops.errors import BundleError
from tests.support.answers import alone, embeddings, greedy, logits_of_a_growing_cache, same

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from hivtp.runtime.language import LanguageBackend


@pytest.fixture(scope="module")
def bundle(prefill_bundle: Path) -> Bundle:
    return Bundle.open(prefill_bundle)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> LanguageBackend:
    return create_language(bundle)


def test_prompts_run_in_their_own_decoder_and_single_tokens_in_the_other(language, monkeypatch):
    runs: list[tuple[Any, int]] = []
    run = BoundRows.run
    monkeypatch.setattr(
        BoundRows,
        "run",
        lambda self, embeds, lengths: runs.append((self.session, embeds.shape[1])) or run(self, embeds, lengths),
    )
    list(language.generate(embeddings(40), 3, greedy))
    list(language.generate(embeddings(LEAST_PROMPT), 1, greedy))
    list(language.generate(embeddings(LEAST_PROMPT - 1), 1, greedy))
    assert [length for _, length in runs] == [40, 1, 1, LEAST_PROMPT, LEAST_PROMPT - 1]
    prefill, decode = runs[0][0], runs[1][0]
    assert prefill is not decode
    assert [session for session, _ in runs] == [prefill, decode, decode, prefill, decode]


def test_both_decoders_go_on_in_one_cache(bundle, language):
    embeds = embeddings(80)
    # A prompt, its answer, and a second turn, long and short.
    bounds = [0, 40, 41, 42, 70, 71, 80]
    steps = [embeds[start:stop] for start, stop in pairwise(bounds)]
    sequence = language.new_cache()
    for step, expected in zip(steps, logits_of_a_growing_cache(bundle, steps), strict=True):
        sequence.reserve(sequence.length + len(step))
        np.testing.assert_allclose(sequence.append(step), expected, atol=1e-4 * np.abs(expected).max())


def test_a_prompt_costs_little_of_what_float32_says(language, unpruned_bundle):
    plain = create_language(Bundle.open(unpruned_bundle))
    embeds = embeddings(40)
    found, expected = (decoder.new_cache() for decoder in (language, plain))
    for sequence in (found, expected):
        sequence.reserve(64)
    logits, exact = found.append(embeds).copy(), expected.append(embeds).copy()
    assert not np.array_equal(logits, exact)
    assert np.linalg.norm(logits - exact) < 0.1 * np.linalg.norm(exact)


def test_a_short_prompt_gives_what_a_bundle_without_that_decoder_gives(language, unpruned_bundle):
    embeds = embeddings(LEAST_PROMPT - 1)
    plain = create_language(Bundle.open(unpruned_bundle))
    assert list(language.generate(embeds, 20, greedy)) == list(plain.generate(embeds, 20, greedy))


def test_answers_together_are_those_alone(prefill_bundle, photo, photos):
    pipeline = Pipeline.load(prefill_bundle)
    requests = [
        Request("What is it?", [photo], max_new_tokens=12),
        Request("Where is the cat on the left?", [photos / "chelsea.png"], max_new_tokens=5),
        Request("Hi", max_new_tokens=8),
    ]
    for answer, request in zip(pipeline.generate_batch(requests), requests, strict=True):
        assert same(answer, alone(pipeline, request))


def test_the_threads_of_the_decoder_for_prompts_rest_after_it(bundle, monkeypatch):
    rests = {}

    def record(file: Path, _settings: EngineSettings, *, stops_spinning: bool = False) -> object:
        rests[file.name] = stops_spinning
        return object()

    monkeypatch.setattr(onnxruntime, "open_session", record)
    onnxruntime.DecoderSessions(bundle.folder, bundle.manifest.language.decoder, EngineSettings())
    assert rests == {"decoder.onnx": False, "prefill.onnx": True}


def test_one_decoder_in_w8a8_answers_alone_and_together(tiny_checkpoint, photo, tmp_path):
    settings = ExportSettings(preset="192", language_precision="w8a8")
    opened = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    assert opened.manifest.language.decoder.prefill_file is None
    pipeline = Pipeline.load(opened.folder)
    requests = [Request("What is it?", [photo], max_new_tokens=12), Request("Hi", max_new_tokens=8)]
    for answer, request in zip(pipeline.generate_batch(requests), requests, strict=True):
        assert len(answer.token_ids) > 1
        assert same(answer, alone(pipeline, request))
    embeds = embeddings(30)
    steps = [embeds[:20], embeds[20:21], embeds[21:]]
    sequence = pipeline.language.new_cache()
    sequence.reserve(len(embeds))
    for step, expected in zip(steps, logits_of_a_growing_cache(opened, steps), strict=True):
        np.testing.assert_allclose(sequence.append(step), expected, atol=1e-4 * np.abs(expected).max())


def test_a_missing_second_decoder_is_named(prefill_bundle, tmp_path):
    folder = shutil.copytree(prefill_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("prefill.onnx"))
    with pytest.raises(BundleError, match=r"lacks language/prefill.onnx; copy or export it again"):
        Pipeline.load(folder)
