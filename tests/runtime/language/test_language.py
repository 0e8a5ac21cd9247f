from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.engines.base import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.runtime.language import LanguageSettings, create_language
from hivtp.runtime.language import onnxruntime as backend
from hivtp_ops.errors import BundleError, EngineError
from tests.support.answers import embeddings, greedy, logits_of_a_growing_cache

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.runtime.language import LanguageBackend
    from tests.support.reference import HuggingFace


@pytest.fixture(scope="module")
def bundle(unpruned_bundle: Path) -> Bundle:
    return Bundle.open(unpruned_bundle)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> LanguageBackend:
    return create_language(bundle, LanguageSettings(engine=EngineSettings(num_threads=1)))


@pytest.fixture
def sequence(language: backend.OnnxRuntimeLanguage) -> backend._Sequence:
    return backend._Sequence(language._sessions, language.manifest, capacity=64)


@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_greedy_tokens_equal_transformers(language, hugging_face: HuggingFace, length):
    embeds = embeddings(length)
    tokens = list(language.generate(embeds, 40, greedy))
    assert tokens == hugging_face.continue_embeds(embeds, 40)
    assert len(set(tokens)) > 10, "an answer that repeats itself would prove little"


def test_logits_equal_transformers_at_every_step(language, hugging_face: HuggingFace):
    embeds, steps = embeddings(30), []
    tokens = list(language.generate(embeds, 20, lambda logits: steps.append(logits.copy()) or greedy(logits)))
    whole = np.concatenate([embeds, language.embed(tokens[:-1])])
    expected = hugging_face.logits(whole)[len(embeds) - 1 :]
    assert np.stack(steps).dtype == np.float32
    np.testing.assert_allclose(np.stack(steps), expected, atol=1e-4 * np.abs(expected).max())


def test_embeddings_are_the_rows_of_the_table(language, hugging_face: HuggingFace):
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    rows = language.embed([5, 511, 0, 5])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[5, 511, 0, 5]])


def test_a_half_precision_table_gives_float32(bundle, tmp_path):
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    file = folder / bundle.manifest.language.decoder.embeddings
    table = np.load(file).astype(np.float16)
    np.save(file, table)
    rows = create_language(replace(bundle, folder=folder)).embed([1, 2])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[1, 2]].astype(np.float32))


def test_past_and_present_are_one_buffer_and_a_step_writes_its_own_row_only(sequence):
    sequence.append(embeddings(1))
    sequence.cut(0)
    caches = sequence._bound.buffers[1:]
    addresses = [cache.data_ptr() for cache in caches]
    assert len(caches) == 4
    assert len(set(addresses)) == 4
    for cache in caches:
        cache.numpy().fill(-7)
    embeds, start = embeddings(20), 0
    for num in (12, 1, 1, 6):
        before = [cache.numpy().copy() for cache in caches]
        sequence.append(embeds[start : start + num])
        for cache, old, address in zip(caches, before, addresses, strict=True):
            new = cache.numpy()
            assert new.ctypes.data == cache.data_ptr() == address
            np.testing.assert_array_equal(new[:, :, :start], old[:, :, :start])
            assert (new[:, :, start : start + num] != -7).all()
            assert (new[:, :, start + num :] == -7).all()
        start += num


def test_a_cache_in_place_gives_the_logits_of_one_that_grows(bundle, sequence):
    embeds = embeddings(20)
    steps = [embeds[:12], embeds[12:13], embeds[13:14], embeds[14:]]
    for step, expected in zip(steps, logits_of_a_growing_cache(bundle, steps), strict=True):
        np.testing.assert_allclose(sequence.append(step), expected, atol=1e-4)


def test_what_lies_beyond_the_filled_part_of_the_cache_is_never_read(language, monkeypatch):
    class Garbage(backend._Sequence):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            for cache in self._cache:
                cache.fill(np.nan)

    embeds = embeddings(50)
    clean = list(language.generate(embeds, 40, greedy))
    monkeypatch.setattr(backend, "_Sequence", Garbage)
    assert list(language.generate(embeds, 40, greedy)) == clean


def test_the_decoder_runs_once_per_token_and_not_after_the_last(language, monkeypatch):
    lengths = []

    class Counted(backend._Sequence):
        def append(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
            lengths.append(len(embeds))
            return super().append(embeds)

    monkeypatch.setattr(backend, "_Sequence", Counted)
    list(language.generate(embeddings(50), 6, greedy))
    assert lengths == [50, 1, 1, 1, 1, 1]


def test_embeddings_of_any_memory_layout_give_the_same(language):
    embeds = embeddings(50)
    expected = list(language.generate(embeds, 20, greedy))
    assert list(language.generate(np.asfortranarray(embeds), 20, greedy)) == expected
    assert list(language.generate(np.repeat(embeds, 2, axis=0)[::2], 20, greedy)) == expected


def test_sequences_in_turn_do_not_touch_each_other(language):
    prompts = [embeddings(length, seed) for seed, length in enumerate((3, 40, 90))]
    alone = [list(language.generate(prompt, 20, greedy)) for prompt in prompts]
    iterators = [language.generate(prompt, 20, greedy) for prompt in prompts]
    next(language.generate(embeddings(7), 20, greedy))
    in_turn = list(zip(*iterators, strict=True))
    assert [list(tokens) for tokens in zip(*in_turn, strict=True)] == alone


def test_the_context_bounds_an_answer(language):
    assert language.context_length == 512
    assert len(list(language.generate(embeddings(509), 40, greedy))) == 3
    assert len(list(language.generate(embeddings(511), 40, greedy))) == 1


def test_max_new_tokens_bounds_an_answer(language):
    embeds = embeddings(10)
    tokens = list(language.generate(embeds, 9, greedy))
    assert [list(language.generate(embeds, count, greedy)) for count in (1, 2, 8)] == [
        tokens[:count] for count in (1, 2, 8)
    ]


def test_an_end_of_sequence_token_is_the_last(language, bundle):
    embeds = embeddings(10)
    tokens = list(language.generate(embeds, 20, greedy))
    end = tokens[6]
    manifest = replace(bundle.manifest.language, eos_token_ids=(2, end))
    ending = create_language(replace(bundle, manifest=replace(bundle.manifest, language=manifest)))
    assert ending.is_end(end)
    assert ending.is_end(2)
    assert not ending.is_end(3)
    assert list(ending.generate(embeds, 20, greedy)) == tokens[: tokens.index(end) + 1]


def test_the_first_step_is_the_prefill_and_nothing_runs_before_it(language):
    calls = []
    tokens = language.generate(embeddings(10), 5, lambda logits: calls.append(logits.shape) or greedy(logits))
    assert calls == []
    next(tokens)
    assert calls == [(512,)]


def test_embeddings_that_do_not_fit_are_an_engine_error(language):
    with pytest.raises(EngineError, match="onnxruntime failed in the decoder"):
        list(language.generate(np.zeros((4, 65), np.float32), 5, greedy))


@pytest.mark.parametrize("table", [np.zeros((512, 63), np.float32), np.zeros((512, 64), np.int64), np.zeros(3)])
def test_a_table_that_is_none_is_refused(bundle, tmp_path, table):
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    np.save(folder / bundle.manifest.language.decoder.embeddings, table)
    with pytest.raises(BundleError, match=r"the manifest says floats of shape \[512, 64\]"):
        create_language(replace(bundle, folder=folder))
