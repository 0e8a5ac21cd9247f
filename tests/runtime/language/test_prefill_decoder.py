"""A bundle with a second decoder, which runs the prompts."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import open_session
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.language import LanguageOptions, create_language, onnxruntime
from hivtp.runtime.language.kv_cache import BoundSlots
from hivtp.runtime.language.onnxruntime import MIN_PREFILL_TOKENS
from hivtp_ops.errors import BundleError
from tests.support.answers import alone, ask, load, same
from tests.support.decoding import Decoded, decode, decode_all, embeddings, logits_of_a_growing_cache

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from hivtp.engines.base import EngineSettings
    from hivtp.runtime.language.base import LanguageBackend

OPTIONS = LanguageOptions(num_threads=1)


@pytest.fixture(scope="module")
def bundle(prefill_bundle: Path) -> Bundle:
    return Bundle.open(prefill_bundle)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> LanguageBackend:
    return create_language(bundle, OPTIONS)


@pytest.fixture(scope="module")
def plain(unpruned_bundle: Path) -> LanguageBackend:
    return create_language(Bundle.open(unpruned_bundle), OPTIONS)


def test_prompts_run_in_their_own_decoder_and_single_tokens_in_the_other(language, monkeypatch):
    runs: list[tuple[Any, int]] = []
    run = BoundSlots.run
    monkeypatch.setattr(
        BoundSlots,
        "run",
        lambda self, embeds, lengths: runs.append((self.session, embeds.shape[1])) or run(self, embeds, lengths),
    )
    for length, num in ((40, 3), (MIN_PREFILL_TOKENS, 1), (MIN_PREFILL_TOKENS - 1, 1)):
        decode(language, embeddings(length), num)
    assert [length for _, length in runs] == [40, 1, 1, MIN_PREFILL_TOKENS, MIN_PREFILL_TOKENS - 1]
    prefill, step = runs[0][0], runs[1][0]
    assert prefill is not step
    assert [session for session, _ in runs] == [prefill, step, step, prefill, step]


def assert_one_cache(bundle: Bundle, language: LanguageBackend, lengths: list[int]) -> None:
    """What is appended piece by piece gives the logits of a cache that grows."""
    bounds = [0, *np.cumsum(lengths)]
    steps = [embeddings(bounds[-1])[start:stop] for start, stop in pairwise(bounds)]
    slots = language.open_slots(1, bounds[-1])
    for step, expected in zip(steps, logits_of_a_growing_cache(bundle, steps), strict=True):
        logits = slots.prefill(0, step, len(step))
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_both_decoders_go_on_in_one_cache(bundle, language):
    # A prompt, its answer, and a second turn, long and short.
    assert_one_cache(bundle, language, [40, 1, 1, 28, 1, 9])


def test_the_chunks_of_a_long_prompt_run_where_the_whole_would(language):
    """Also those that are short, so that the tokens are those of the prompt alone."""
    sequences = [Decoded(embeddings(length, length), 30) for length in (20, 90, 41)]
    expected = [decode(language, sequence.embeds, 30) for sequence in sequences]
    for chunk_size in (7, 16, 40):
        found = [Decoded(sequence.embeds, 30) for sequence in sequences]
        decode_all(language, found, chunk_size=chunk_size, steps_per_chunk=2)
        assert [sequence.tokens for sequence in found] == expected


def test_a_prompt_costs_little_of_what_float32_says(language, plain):
    logits, exact = (decoder.open_slots(1, 64).prefill(0, embeddings(40), 40).copy() for decoder in (language, plain))
    assert not np.array_equal(logits, exact)
    assert np.linalg.norm(logits - exact) < 0.1 * np.linalg.norm(exact)


def test_a_short_prompt_gives_what_a_bundle_without_that_decoder_gives(language, plain):
    embeds = embeddings(MIN_PREFILL_TOKENS - 1)
    assert decode(language, embeds, 20) == decode(plain, embeds, 20)


def test_answers_together_are_those_alone(prefill_bundle, photo, photos):
    pipeline = load(prefill_bundle)
    requests = [
        ask("What is it?", [photo], 12),
        ask("Where is the cat on the left?", [photos / "chelsea.png"], 5),
        ask("Hi", (), 8),
    ]
    for answer, request in zip(pipeline.generate_batch(requests), requests, strict=True):
        assert same(answer, alone(pipeline, request))


def test_the_threads_of_the_decoder_for_prompts_rest_after_it(bundle, monkeypatch):
    rests = {}

    def record(file: Path, settings: EngineSettings, *, stops_spinning: bool = False) -> object:
        rests[file.name] = stops_spinning
        return open_session(file, settings, stops_spinning=stops_spinning)

    monkeypatch.setattr(onnxruntime, "open_session", record)
    create_language(bundle, OPTIONS)
    assert rests == {"decoder.onnx": False, "prefill.onnx": True}


def test_one_decoder_in_w8a8_answers_alone_and_together(tiny_checkpoint, photo, tmp_path):
    settings = ExportSettings(preset="192", language_precision="w8a8")
    opened = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    assert opened.manifest.language.decoder.prefill_file is None
    pipeline = load(opened.folder)
    requests = [ask("What is it?", [photo], 12), ask("Hi", (), 8)]
    for answer, request in zip(pipeline.generate_batch(requests), requests, strict=True):
        assert len(answer.token_ids) > 1
        assert same(answer, alone(pipeline, request))
    assert_one_cache(opened, pipeline.model.language, [20, 1, 9])


def test_a_missing_second_decoder_is_named(prefill_bundle, tmp_path):
    folder = shutil.copytree(prefill_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("prefill.onnx"))
    with pytest.raises(BundleError, match=r"language/prefill.onnx is missing; copy or export the bundle again"):
        load(folder)
