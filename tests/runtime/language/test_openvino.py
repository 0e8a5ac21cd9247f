"""The bundle's decoder in OpenVINO: paged attention against transformers and against ONNX Runtime."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.engines.bundle import Bundle
from hivtp.runtime.language import LanguageOptions, create_language
from hivtp_ops.errors import BundleError, EngineError, MissingExtraError, OutOfMemoryError, SettingsError
from tests.support.decoding import Decoded, decode, decode_all, embeddings, greedy, logits_of_a_growing_cache

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.runtime.language.openvino import OpenVinoLanguage
    from tests.support.reference import HuggingFace

pytest.importorskip("openvino", reason="openvino is not installed")

OPTIONS = LanguageOptions("openvino", num_threads=1, precision="float32")


@pytest.fixture(scope="module")
def bundle(unpruned_bundle: Path) -> Bundle:
    return Bundle.open(unpruned_bundle)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> OpenVinoLanguage:
    return create_language(bundle, OPTIONS)


@pytest.fixture(scope="module", params=["float32", "auto"])
def either(request: pytest.FixtureRequest, bundle: Bundle) -> OpenVinoLanguage:
    return create_language(bundle, LanguageOptions("openvino", num_threads=1, precision=request.param))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 200])
def test_greedy_tokens_equal_transformers(language, hugging_face: HuggingFace, length):
    tokens = decode(language, embeddings(length), 40)
    assert tokens == hugging_face.continue_embeds(embeddings(length), 40)
    assert len(set(tokens)) > 10, "an answer that repeats itself would prove little"


def test_logits_are_those_of_transformers_at_every_step(language, hugging_face: HuggingFace):
    steps = []
    tokens = decode(language, embeddings(30), 20, lambda logits: steps.append(logits.copy()) or greedy(logits))
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    expected = hugging_face.logits(np.concatenate([embeddings(30), table[tokens[:-1]]]))[29:]
    assert np.stack(steps).dtype == np.float32
    np.testing.assert_allclose(np.stack(steps), expected, atol=1e-4 * np.abs(expected).max())


# Of int4: both round activations to 8 bits on the way, each in its own blocks.
@pytest.mark.parametrize(("name", "tolerance"), [("unpruned_bundle", 1e-4), ("int4_bundle", 3e-2)])
def test_chunks_and_steps_give_the_logits_of_onnxruntime(request, name, tolerance):
    opened = Bundle.open(request.getfixturevalue(name))
    embeds = embeddings(80)
    steps = [embeds[:40], embeds[40:41], embeds[41:42], embeds[42:75], embeds[75:]]
    slots = create_language(opened, OPTIONS).open_slots(1, 90)
    for step, expected in zip(steps, logits_of_a_growing_cache(opened, steps), strict=True):
        found = slots.prefill(0, step, len(step))
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_prompts_of_a_bundle_with_a_prefill_decoder_run_in_the_other(prefill_bundle):
    """OpenVINO is no faster in it, and keys and values of one decoder alone are nearer to float32."""
    opened = Bundle.open(prefill_bundle)
    language = create_language(opened, OPTIONS)
    assert language.description == "fp32 decoder in openvino in float32"
    whole = create_language(opened, LanguageOptions(num_threads=1)).open_slots(1, 40)
    expected = whole.prefill(0, embeddings(12), 12)
    np.testing.assert_allclose(language.open_slots(1, 40).prefill(0, embeddings(12), 12), expected, atol=1e-4)


def test_requests_get_together_what_each_gets_alone(either):
    lengths = (3, 50, 30, 1, 32)
    alone = [decode(either, embeddings(length, length), 24) for length in lengths]
    sequences = [Decoded(embeddings(length, length), 24) for length in lengths]
    decode_all(either, sequences, chunk_size=16)
    assert [sequence.tokens for sequence in sequences] == alone


def test_keys_and_values_are_written_in_place_and_nothing_else_is(either):
    slots = either.open_slots(3, 64)
    assert len(slots._memories) == 4
    for memory in slots._memories.values():
        memory.fill(1)
    start = 0
    for num in (12, 1, 1, 6, 20):
        before = {name: memory.copy() for name, memory in slots._memories.items()}
        slots.prefill(1, embeddings(40)[start : start + num], 40)
        for name, memory in slots._memories.items():
            # Two blocks of 32 positions in each slot.
            held, old = (np.concatenate(list(array[2:4]), axis=1) for array in (memory, before[name]))
            np.testing.assert_array_equal(held[:, :start], old[:, :start])
            assert (held[:, start : start + num] != 1).mean() > 0.9
            # OpenVINO clears what is left of the last block.
            assert (held[:, -(-(start + num) // 32) * 32 :] == 1).all()
            assert (memory[[0, 1, 4, 5]] == 1).all()
        start += num
    assert [slots.length(slot) for slot in range(3)] == [0, 40, 0]


def test_a_cache_that_grows_keeps_what_it_holds(either):
    small, large = either.open_slots(2, 40), either.open_slots(2, 200)
    for slots in (small, large):
        for slot in (0, 1):
            slots.prefill(slot, embeddings(36 - 10 * slot, slot), 36)
        slots.step([0, 1], embeddings(2, 7))
    small.reserve(10)
    assert small.capacity == 40
    small.reserve(150)
    for _ in range(3):
        found, expected = (slots.step([0, 1], embeddings(2)).copy() for slots in (small, large))
        np.testing.assert_array_equal(found, expected)
    assert (small.capacity, small.length(0), small.length(1)) == (150, 40, 30)


def test_a_slot_that_was_truncated_goes_on_from_there(language):
    slots = language.open_slots(2, 64)
    expected = slots.prefill(0, embeddings(20), 20).copy()
    slots.prefill(0, embeddings(30, 1), 30)
    slots.truncate(0, 19)
    np.testing.assert_allclose(slots.prefill(0, embeddings(20)[19:], 1), expected, atol=1e-4)


def test_a_slot_that_takes_no_part_in_a_step_keeps_what_it_holds(either):
    slots = either.open_slots(3, 40)
    for slot in range(3):
        slots.prefill(slot, embeddings(10, slot), 10)
    before = {name: memory[2:4].copy() for name, memory in slots._memories.items()}
    for _ in range(5):
        slots.step([0, 2], embeddings(2))
    assert [slots.length(slot) for slot in range(3)] == [15, 10, 15]
    for name, memory in slots._memories.items():
        np.testing.assert_array_equal(memory[2:4], before[name])


def test_the_memory_of_a_position_is_that_of_the_cache(either):
    memories = either.open_slots(3, 64)._memories.values()
    assert sum(memory.nbytes for memory in memories) == 3 * 64 * either.kv_bytes_per_position


def test_a_run_that_fails_leaves_the_slots_usable(language):
    slots = language.open_slots(1, 64)
    first = slots.prefill(0, embeddings(9), 9).copy()
    with pytest.raises(EngineError, match="openvino failed while running the decoder"):
        slots.prefill(0, np.zeros((4, 65), np.float32), 4)
    assert slots.length(0) == 9
    slots.truncate(0, 0)
    np.testing.assert_array_equal(slots.prefill(0, embeddings(9), 9), first)
    assert decode(language, embeddings(5), 5) == decode(language, embeddings(5), 5)


def test_memory_that_runs_out_says_what_to_do(language):
    slots = language.open_slots(1, 64)
    with pytest.raises(OutOfMemoryError, match="allocating the KV cache"):
        language.open_slots(2**20, 2**30)
    with pytest.raises(OutOfMemoryError, match="allocating the KV cache"):
        slots.reserve(2**50)
    assert (slots.length(0), slots.capacity) == (0, 64)
    assert slots.prefill(0, embeddings(3), 3).shape == (512,)


def test_embeddings_are_the_vectors_of_the_table(language, hugging_face: HuggingFace):
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(language.embed([5, 511, 0, 5]), table[[5, 511, 0, 5]])


def test_a_closed_decoder_says_so(bundle):
    language = create_language(bundle, OPTIONS)
    language.close()
    for use in (lambda: language.embed([1]), lambda: language.open_slots(1, 10)):
        with pytest.raises(EngineError, match="this pipeline is closed; load the bundle again"):
            use()


def test_openvino_that_is_missing_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hivtp\[openvino\]'"):
        create_language(bundle, OPTIONS)


def test_a_decoder_for_a_gpu_and_a_bundle_without_one_are_refused(half_bundle, bare_bundle):
    with pytest.raises(EngineError, match="is fp16, made for a GPU; export the bundle with --language-precision fp32"):
        create_language(Bundle.open(half_bundle), OPTIONS)
    with pytest.raises(BundleError, match="holds no decoder"):
        create_language(Bundle.open(bare_bundle), OPTIONS)


def test_attention_that_would_be_computed_wrongly_is_refused(bundle, monkeypatch):
    monkeypatch.setattr("hivtp.engines.openvino.paged.EXPECTED", {"local_window_size": 4096})
    with pytest.raises(EngineError, match=r"attention has local_window_size -1, which .* choose onnxruntime"):
        create_language(bundle, OPTIONS)


def test_another_version_of_openvino_is_named(bundle, monkeypatch):
    def changed(_inputs: object) -> None:
        raise RuntimeError("expects 30 inputs, but it has 28")

    monkeypatch.setattr("openvino.op._PagedAttentionExtension", changed)
    with pytest.raises(EngineError, match=r"this version of openvino, .*, cannot page .*30 inputs.*hivtp\[openvino\]"):
        create_language(bundle, OPTIONS)


def test_options_of_other_backends_are_refused():
    with pytest.raises(SettingsError, match="openvino runs the bundle's decoder on one of auto, cpu, not on 'cuda'"):
        LanguageOptions("openvino", device="cuda")
    with pytest.raises(SettingsError, match="precision 'bfloat16' belongs to the language backend openvino"):
        LanguageOptions(precision="bfloat16")
    with pytest.raises(SettingsError, match="checkpoint 'x' belongs to the language backend transformers"):
        LanguageOptions("openvino", checkpoint="x")
