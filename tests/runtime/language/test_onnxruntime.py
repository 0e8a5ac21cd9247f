"""The bundle's decoder in ONNX Runtime: float32 against transformers, float16 against its own graph run plainly."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest

from hivtp.engines import onnxruntime_cuda
from hivtp.engines.bundle import Bundle
from hivtp.runtime.language import LanguageOptions, create_language
from hivtp.runtime.language.kv_cache import KvCache
from hivtp_ops.errors import BundleError, EngineError, EngineWarning, OutOfMemoryError, SettingsError
from tests.support.decoding import Decoded, decode, decode_all, embeddings, greedy, logits_of_a_growing_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage
    from tests.support.reference import HuggingFace

OPTIONS = LanguageOptions(num_threads=1)


@pytest.fixture(scope="module")
def bundle(unpruned_bundle: Path) -> Bundle:
    return Bundle.open(unpruned_bundle)


@pytest.fixture(scope="module")
def half(half_bundle: Path) -> Bundle:
    return Bundle.open(half_bundle)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> OnnxRuntimeLanguage:
    return create_language(bundle, OPTIONS)


@pytest.fixture(scope="module", params=["bundle", "half"])
def either(request: pytest.FixtureRequest) -> tuple[Bundle, OnnxRuntimeLanguage]:
    """A bundle and its decoder, in float32 and in float16."""
    opened = request.getfixturevalue(request.param)
    return opened, create_language(opened, OPTIONS)


@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_greedy_tokens_equal_transformers(language, hugging_face: HuggingFace, length):
    tokens = decode(language, embeddings(length), 40)
    assert tokens == hugging_face.continue_embeds(embeddings(length), 40)
    assert len(set(tokens)) > 10, "an answer that repeats itself would prove little"


def noted(steps: list[NDArray[np.float32]]) -> Callable[[NDArray[np.float32]], int]:
    return lambda logits: steps.append(logits.copy()) or greedy(logits)


# Of float16: its own rounding.
@pytest.mark.parametrize(("name", "tolerance"), [("bundle", 1e-4), ("half", 1e-2)])
def test_logits_are_those_of_transformers_at_every_step(request, hugging_face: HuggingFace, name, tolerance):
    language, steps = create_language(request.getfixturevalue(name), OPTIONS), []
    tokens = decode(language, embeddings(30), 20, noted(steps))
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    expected = hugging_face.logits(np.concatenate([embeddings(30), table[tokens[:-1]]]))[29:]
    assert np.stack(steps).dtype == np.float32
    np.testing.assert_allclose(np.stack(steps), expected, atol=tolerance * np.abs(expected).max())


def test_embeddings_are_the_rows_of_the_table(language, hugging_face: HuggingFace):
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    rows = language.embed([5, 511, 0, 5])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[5, 511, 0, 5]])


def test_a_half_precision_table_gives_float32(half):
    rows = create_language(half, OPTIONS).embed([1, 2])
    assert rows.dtype == np.float32
    table = np.load(half.folder / half.manifest.language.decoder.embeddings)
    assert table.dtype == np.float16
    np.testing.assert_array_equal(rows, table[[1, 2]].astype(np.float32))


def test_keys_and_values_are_written_in_place_and_nothing_else_is(either):
    _, language = either
    slots = language.open_slots(2, 64)
    memories = [memory.array for memory in slots._cache._memories]
    assert {memory.dtype for memory in memories} == {language.dtype}
    assert len({memory.ctypes.data for memory in memories}) == len(memories) == 4
    for memory in memories:
        memory.fill(-7)
    start = 0
    for num in (12, 1, 1, 6):
        before = [memory.copy() for memory in memories]
        slots.prefill(1, embeddings(20)[start : start + num], 20)
        for new, old in zip(memories, before, strict=True):
            np.testing.assert_array_equal(new[1, :, :start], old[1, :, :start])
            assert (new[1, :, start : start + num] != -7).all()
            assert (new[1, :, start + num :] == -7).all()
            assert (new[0] == -7).all()
        start += num
    assert [slots.length(slot) for slot in (0, 1)] == [0, 20]


def test_a_cache_in_place_gives_the_logits_of_one_that_grows(either):
    bundle, language = either
    embeds = embeddings(20)
    steps = [embeds[:12], embeds[12:13], embeds[13:14], embeds[14:]]
    slots = language.open_slots(1, 64)
    for step, expected in zip(steps, logits_of_a_growing_cache(bundle, steps), strict=True):
        np.testing.assert_allclose(slots.prefill(0, step, len(step)), expected, atol=1e-4)


def test_what_lies_beyond_the_filled_part_of_the_cache_is_never_read(either, monkeypatch):
    _, language = either

    def answers() -> list[list[int]]:
        sequences = [Decoded(embeddings(length, length), 12) for length in (3, 50, 30)]
        decode_all(language, sequences)
        return [sequence.tokens for sequence in sequences]

    def filled(cache: KvCache) -> Any:
        memory = allocate(cache)
        memory.array.fill(np.nan)
        return memory

    clean, allocate = answers(), KvCache._allocate
    monkeypatch.setattr(KvCache, "_allocate", filled)
    assert answers() == clean


def test_embeddings_of_any_memory_layout_give_the_same(language):
    embeds = embeddings(50)
    expected = decode(language, embeds, 20)
    assert decode(language, np.asfortranarray(embeds), 20) == expected
    assert decode(language, np.repeat(embeds, 2, axis=0)[::2], 20) == expected


def test_embeddings_that_do_not_fit_are_an_engine_error(language):
    with pytest.raises(EngineError, match="onnxruntime failed while running the decoder"):
        decode(language, np.zeros((4, 65), np.float32), 5)


def test_memory_that_runs_out_in_onnxruntime_says_what_to_do(language, monkeypatch):
    slots = language.open_slots(1, 64)

    def no_room(_binding: Any) -> None:
        raise MemoryError("for 9 GiB")

    monkeypatch.setattr(language._loaded.decode, "run_with_iobinding", no_room)
    with pytest.raises(OutOfMemoryError, match=r"running the decoder \(for 9 GiB\); give fewer"):
        slots.prefill(0, embeddings(3), 3)
    with pytest.raises(OutOfMemoryError, match="allocating the KV cache"):
        language.open_slots(2**20, 2**30)
    with pytest.raises(OutOfMemoryError, match="allocating the KV cache"):
        slots.reserve(2**50)
    monkeypatch.undo()
    assert (slots.length(0), slots.capacity) == (0, 64)
    assert slots.prefill(0, embeddings(3), 3).shape == (512,)


def test_a_cache_that_grows_keeps_what_it_holds(either):
    _, language = either
    small, large = language.open_slots(2, 20), language.open_slots(2, 64)
    for slots in (small, large):
        for slot in (0, 1):
            slots.prefill(slot, embeddings(18, slot), 18)
        slots.step([0, 1], embeddings(2, 7))
    small.reserve(10)
    assert small.capacity == 20
    small.reserve(50)
    for _ in range(3):
        found, expected = (slots.step([0, 1], embeddings(2)) for slots in (small, large))
        np.testing.assert_array_equal(found, expected)
    assert (small.capacity, small.length(0), small.length(1)) == (50, 22, 22)


def test_a_slot_that_takes_no_part_in_a_step_keeps_what_it_holds(either):
    """It runs as a dummy where slots on both sides of it step."""
    _, language = either
    slots, expected = language.open_slots(4, 24), language.open_slots(4, 24)
    for slot, length in enumerate((5, 12, 24, 9)):
        logits = slots.prefill(slot, embeddings(length, slot), length).copy()
        np.testing.assert_array_equal(expected.prefill(slot, embeddings(length, slot), length), logits)
    slots.truncate(1, 11)
    for _ in range(8):
        slots.step([0, 3], embeddings(2))
    assert [slots.length(slot) for slot in range(4)] == [13, 11, 23, 17]
    expected.truncate(1, 11)
    # The full one has forgotten its last position, for which the dummy took its place.
    expected.truncate(2, 23)
    for slot in (1, 2):
        last = embeddings(1, seed=9)
        np.testing.assert_array_equal(slots.prefill(slot, last, 1), expected.prefill(slot, last, 1))


def test_many_ranges_of_slots_are_bound_one_after_the_other(language):
    """More than stay bound."""
    slots = language.open_slots(7, 40)
    for slot in range(7):
        slots.prefill(slot, embeddings(5, slot), 5)
    expected = [slots.prefill(slot, embeddings(1, 1), 1).copy() for slot in range(7)]
    for start in range(7):
        for stop in range(start + 1, 8):
            for slot in range(start, stop):
                slots.truncate(slot, 5)
            found = slots.step(range(start, stop), np.repeat(embeddings(1, 1), stop - start, axis=0))
            np.testing.assert_allclose(found, expected[start:stop], atol=1e-5)
    assert len(slots._ranges) == 16


def test_the_memory_of_a_position_is_that_of_the_cache(either):
    _, language = either
    memories = language.open_slots(3, 50)._cache._memories
    assert sum(memory.array.nbytes for memory in memories) == 3 * 50 * language.kv_bytes_per_position


@pytest.mark.parametrize("table", [np.zeros((512, 63), np.float32), np.zeros((512, 64), np.int64), np.zeros(3)])
def test_another_table_is_refused(bundle, tmp_path, table):
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    np.save(folder / bundle.manifest.language.decoder.embeddings, table)
    with pytest.raises(BundleError, match=r"the manifest says floats of shape \[512, 64\]"):
        create_language(replace(bundle, folder=folder), OPTIONS)


def test_a_closed_decoder_says_so(bundle):
    language = create_language(bundle, OPTIONS)
    slots = language.open_slots(1, 10)
    language.close()
    language.close()
    for use in (lambda: language.embed([1]), lambda: language.open_slots(1, 10)):
        with pytest.raises(EngineError, match="this pipeline is closed; load the bundle again"):
            use()
    assert slots.length(0) == 0


def test_a_float16_decoder_is_taken_to_the_cpu_where_there_is_no_cuda(half, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: False)
    for device in ("auto", "cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = create_language(half, LanguageOptions(device=device))
        assert (opened.device, opened.dtype) == ("cpu", np.float16)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_named_and_the_cpu_answers(half, monkeypatch):
    if onnxruntime_cuda.has_cuda_provider():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr("hivtp.engines.onnxruntime_cuda.has_cuda_provider", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "check_cuda_package", lambda: None)
    with pytest.warns(EngineWarning, match=r"cannot run on a GPU, taking the CPU: .*could not start CUDA"):
        opened = create_language(half, OPTIONS)
    assert opened.device == "cpu"
    with pytest.raises(EngineError, match="could not start CUDA"):
        create_language(half, LanguageOptions(device="cuda"))


def test_a_package_for_the_cpu_alone_says_what_to_install(half, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"hivtp\[cuda\]"):
        create_language(half, LanguageOptions(device="cuda"))


def test_a_float32_decoder_runs_on_the_cpu_and_is_refused_on_a_gpu(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    assert create_language(bundle, OPTIONS).device == "cpu"
    with pytest.raises(EngineError, match=r"is fp32, made for the CPU.*--language-precision fp16 or int4-fp16"):
        create_language(bundle, LanguageOptions(device="cuda"))


def test_a_device_that_the_decoder_cannot_run_on_is_refused():
    with pytest.raises(SettingsError, match="decoder on one of auto, cpu, cuda, not on 'cuda:1'"):
        LanguageOptions(device="cuda:1")


@pytest.mark.gpu
def test_on_a_gpu_logits_are_near_those_of_the_cpu_alone_together_and_after_growing(half):
    on_cpu, on_gpu = (create_language(half, LanguageOptions(device=device)) for device in ("cpu", "cuda"))

    def logits(language: OnnxRuntimeLanguage) -> NDArray[np.float32]:
        slots = language.open_slots(3, 210)
        found = [slots.prefill(slot, embeddings(length, slot), length) for slot, length in enumerate((1, 40, 200))]
        found = [row.copy() for row in found]
        slots.reserve(300)
        for seed in range(4):
            found += list(slots.step([0, 1, 2], embeddings(3, seed)).copy())
        return np.stack(found)

    expected = logits(on_cpu)
    np.testing.assert_allclose(logits(on_gpu), expected, atol=1e-2 * np.abs(expected).max())
