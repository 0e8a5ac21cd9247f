"""The decoder for a GPU: the same classes in host memory here, and on a GPU under the marker `gpu`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from hivtp.engines.device import DeviceContext, open_device
from hivtp.runtime.device_rows import DeviceRows, concatenate
from hivtp.runtime.language.onnxruntime_device import OnnxRuntimeDeviceLanguage

from hivtp import Pipeline
from hivtp.engines import EngineSettings, onnxruntime_cuda
from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import open_session
from hivtp.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine
from hivtp.export.verify.checks import relative_error
from hivtp.runtime.cli.run import main
from hivtp.runtime.language import LanguageSettings, create_language
from hivtp.runtime.language import onnxruntime_device as backend
from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage
from hivtp.runtime.request import Request
from hivtp.runtime.vision.cache import EmbeddingCache
from hivtp.runtime.vision.encoder import open_image_encoder
from hivtp.runtime.vision.stage import VisionStage
from hivtp_ops.errors import EngineError, EngineWarning, OutOfMemoryError, SettingsError
from tests.support.answers import embeddings, greedy

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.support.reference import HuggingFace

SETTINGS = EngineSettings(num_threads=1)


@pytest.fixture(scope="module")
def bundle(half_bundle: Path) -> Bundle:
    return Bundle.open(half_bundle)


def open_language(bundle: Bundle, device: DeviceContext) -> OnnxRuntimeDeviceLanguage:
    return OnnxRuntimeDeviceLanguage(bundle.folder, bundle.manifest.language, SETTINGS, device)


@pytest.fixture(scope="module")
def language(bundle: Bundle) -> OnnxRuntimeDeviceLanguage:
    return open_language(bundle, DeviceContext("cpu"))


def tokens_of_a_growing_cache(bundle: Bundle, embeds: NDArray[np.float32], num_tokens: int) -> list[int]:
    """Greedy tokens of the float16 decoder, run plainly: every step gets the past as a new, longer array."""
    manifest = bundle.manifest.language
    session = open_session(bundle.folder / manifest.decoder.file, SETTINGS)
    table = np.load(bundle.folder / manifest.decoder.embeddings)
    names = [output.name for output in session.get_outputs()]
    empty = np.zeros((1, manifest.num_kv_heads, 0, manifest.head_size), np.float16)
    past = {
        f"past_key_values.{layer}.{kind}": empty for layer in range(manifest.num_layers) for kind in ("key", "value")
    }
    tokens, length, step = [], 0, embeds.astype(np.float16)
    for _ in range(num_tokens):
        length += len(step)
        mask = np.ones((1, length), np.int64)
        outputs = session.run(names, {"inputs_embeds": step[None], "attention_mask": mask, **past})
        outputs = dict(zip(names, outputs, strict=True))
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        step = table[tokens[-1:]]
    return tokens


@pytest.mark.parametrize("length", [1, 17, 200])
def test_tokens_are_those_of_the_decoder_run_plainly(language, bundle, length):
    embeds = embeddings(length)
    assert list(language.generate(embeds, 20, greedy)) == tokens_of_a_growing_cache(bundle, embeds, 20)


def test_logits_are_near_those_of_transformers_at_every_step(language, hugging_face: HuggingFace):
    embeds, steps = embeddings(30), []
    tokens = list(language.generate(embeds, 20, lambda logits: steps.append(logits.copy()) or greedy(logits)))
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    expected = hugging_face.logits(np.concatenate([embeds, table[tokens[:-1]]]))[len(embeds) - 1 :]
    assert np.stack(steps).dtype == np.float32
    assert relative_error(np.stack(steps), expected) < 5e-3


def test_a_prompt_is_gathered_from_wherever_its_rows_lie(language, bundle):
    table = np.load(bundle.folder / bundle.manifest.language.decoder.embeddings)
    tiles, newline = embeddings(12).reshape(2, 6, 64), embeddings(1, seed=1)
    sources = [tiles, torch.from_numpy(tiles), onnxruntime.OrtValue.ortvalue_from_numpy(tiles)]
    sources.append(language.device.place(tiles))
    array = np.concatenate([table[[5, 6]], tiles[1, :4], newline, tiles[0], table[[7]]]).astype(np.float32)
    expected = list(language.generate(array, 12, greedy))
    for source in sources:
        text = language.embed([5, 6, 7])
        first, second = (DeviceRows.of_source(source, 6, start) for start in (0, 6))
        prompt = concatenate([text[:2], second[:4], newline, first, text[2:]])
        assert list(language.generate(prompt, 12, greedy)) == expected


def test_keys_and_values_are_written_in_place_and_nothing_else_is(language):
    sequence = language._new_sequence(64)
    sequence._cache = language._decoder.new_cache(1, 64)
    caches = [view.owner.numpy() for view in sequence._cache]
    for cache, view in zip(caches, sequence._cache, strict=True):
        assert (cache.dtype, cache.ctypes.data) == (np.float16, view.address)
        cache.fill(-7)
    embeds, start = embeddings(20), 0
    for num in (12, 1, 1, 6):
        before = [cache.copy() for cache in caches]
        sequence.append(embeds[start : start + num])
        for new, old in zip(caches, before, strict=True):
            np.testing.assert_array_equal(new[:, :, :start], old[:, :, :start])
            assert (new[:, :, start : start + num] != -7).all()
            assert (new[:, :, start + num :] == -7).all()
        start += num


def test_what_lies_beyond_the_filled_part_of_the_cache_is_never_read(language, monkeypatch):
    embeds = embeddings(50)
    requests = [DecodeRequest(embeddings(length, length), 12, greedy) for length in (3, 30)]
    clean = list(language.generate(embeds, 20, greedy)), list(language.generate_batch(requests))
    empty = DeviceContext.empty

    def garbage(self, shape, dtype):
        view = empty(self, shape, dtype)
        view.owner.numpy().fill(np.nan)
        return view

    monkeypatch.setattr(DeviceContext, "empty", garbage)
    assert (list(language.generate(embeds, 20, greedy)), list(language.generate_batch(requests))) == clean


@pytest.mark.parametrize("counts", [(6, 6, 6), (9, 2, 5), (1, 8, 3), (2, 9, 9)])
def test_a_batch_gives_what_each_gives_alone(language, counts):
    prompts = [embeddings(length, seed) for seed, length in enumerate((3, 40, 17))]
    alone = [list(language.generate(prompt, num, greedy)) for prompt, num in zip(prompts, counts, strict=True)]
    requests = [DecodeRequest(prompt, num, greedy) for prompt, num in zip(prompts, counts, strict=True)]
    together: list[list[int]] = [[] for _ in requests]
    for step in language.generate_batch(requests):
        for index, token in step.items():
            together[index].append(token)
    assert together == alone


def test_a_request_that_fails_costs_no_other_its_answer(language):
    def fails(_logits: NDArray[np.float32]) -> int:
        raise OutOfMemoryError("no more")

    prompts = [embeddings(length, seed) for seed, length in enumerate((3, 40, 17))]
    choosers = (greedy, fails, greedy)
    requests = [DecodeRequest(prompt, 6, chooser) for prompt, chooser in zip(prompts, choosers, strict=True)]
    steps = list(language.generate_batch(requests))
    for index in (0, 2):
        assert [step[index] for step in steps if index in step] == list(language.generate(prompts[index], 6, greedy))
    assert [type(step[1]) for step in steps if 1 in step] == [OutOfMemoryError]


def test_where_memory_is_short_the_halves_of_a_batch_come_one_after_the_other(language, monkeypatch):
    prompts = [embeddings(length, seed) for seed, length in enumerate((3, 40, 17, 5, 8))]
    alone = [list(language.generate(prompt, 4, greedy)) for prompt in prompts]
    new_cache, sizes = backend.DeviceDecoder.new_cache, []

    def short(self, num_rows, capacity):
        sizes.append(num_rows)
        if num_rows > 2:
            raise OutOfMemoryError("no more")
        return new_cache(self, num_rows, capacity)

    monkeypatch.setattr(backend.DeviceDecoder, "new_cache", short)
    together: list[list[int]] = [[] for _ in prompts]
    for step in language.generate_batch([DecodeRequest(prompt, 4, greedy) for prompt in prompts]):
        for index, token in step.items():
            together[index].append(token)
    assert together == alone
    assert sizes == [5, 2, 3, 1, 2]


def test_a_cache_that_grows_keeps_what_it_holds(language):
    embeds = embeddings(60)
    expected = list(language.generate(embeds, 20, greedy))
    cache = language.new_cache()
    list(language.generate(embeds[:20], 3, greedy, cache))
    cache.cut(20)
    assert list(language.generate(embeds[20:], 20, greedy, cache)) == expected
    assert cache.length == 79


def bound_pipeline(bundle: Bundle, device: DeviceContext, *, is_bound: bool = True) -> Pipeline:
    """A pipeline whose vision graph and decoder share a device, or hand embeddings over by the host."""
    loaded = Pipeline.load(bundle.folder, num_threads=1, language_device="cpu")
    language = open_language(bundle, device)
    engine = OnnxRuntimeCudaEngine(bundle.vision_file, SETTINGS, device=device.device)
    stage = VisionStage(engine, bundle.manifest.vision, 2, language.rows_device if is_bound else None)
    images = open_image_encoder(bundle, stage, EmbeddingCache())
    return Pipeline(bundle, images, loaded.template, loaded.tokenizer, language)


@pytest.fixture
def bound(bundle: Bundle) -> Pipeline:
    return bound_pipeline(bundle, DeviceContext("cpu", stream=4711))


def test_image_embeddings_stay_on_the_device_and_the_host_waits_once_before_the_first_token(
    bound, bundle, photo, monkeypatch
):
    expected = bound_pipeline(bundle, DeviceContext("cpu"), is_bound=False).generate("what", [photo], max_new_tokens=12)
    read = []
    numpy = onnxruntime.OrtValue.numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda value: read.append(list(value.shape())) or numpy(value))
    stream = bound.stream("what", [photo], max_new_tokens=1)
    list(stream)
    [image] = stream.images
    assert isinstance(image.embeds, DeviceRows)
    # Indices, counts and scores of one tile; the embeddings are [1, 32, 64].
    assert read == [[1, 32], [1], [1, 64]]
    # The decoder's own run, which brings the logits: assembling the prompt adds none.
    assert bound.language.device.num_waits == 1
    answer = bound.generate("what", [photo], max_new_tokens=12)
    assert answer.token_ids[:1] == stream.answer.token_ids
    assert answer.token_ids == expected.token_ids
    assert answer.kept_indices == expected.kept_indices
    assert answer.num_kept_tokens == expected.num_kept_tokens
    assert len(read) == 3, "the picture was seen before"
    assert bound.language.device.num_waits == 1 + 12


def test_batches_chats_and_seen_images_answer_as_alone(bound, photos):
    names = ("astronaut.png", "chelsea.png", "coffee.png")
    alone = [bound.generate(f"what {name[0]}", [photos / name], max_new_tokens=6).token_ids for name in names]
    again = [bound.generate(f"what {name[0]}", [photos / name], max_new_tokens=6).token_ids for name in names]
    requests = [Request(f"what {name[0]}", [photos / name], max_new_tokens=6) for name in names]
    fresh = bound_pipeline(bound.bundle, DeviceContext("cpu"))
    assert [answer.token_ids for answer in fresh.generate_batch(requests)] == again == alone
    two = [photos / name for name in names[:2]]
    expected = bound.generate("a <image> b <image>", two, max_new_tokens=6).token_ids
    assert fresh.generate("a <image> b <image>", two, max_new_tokens=6).token_ids == expected
    chat = bound.chat()
    first = chat.ask("what a", [photos / names[0]], max_new_tokens=6)
    assert first.token_ids == alone[0]
    second = chat.ask("is it red", max_new_tokens=6)
    assert len(second.token_ids) == 6


def test_what_an_image_holds_is_all_that_its_run_wrote(bound, photos):
    prepared = bound.prepare("<image> <image>", [photos / "astronaut.png", photos / "coffee.png"])
    images = bound.images.encode(prepared.images)
    assert images[0].embeds.sources == images[1].embeds.sources
    for image in images:
        assert image.num_bytes >= 2 * 32 * 64 * 4


def test_a_float16_decoder_is_taken_to_the_cpu_where_there_is_no_cuda(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: False)
    for device in ("auto", "cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = create_language(bundle, LanguageSettings(device=device))
        assert isinstance(opened, OnnxRuntimeDeviceLanguage)
        assert opened.rows_device == "cpu"


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_named_and_the_cpu_answers(bundle, monkeypatch):
    if onnxruntime_cuda.has_cuda_provider():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "check_cuda_package", lambda: None)
    with pytest.warns(EngineWarning, match=r"cannot run on a GPU, taking the CPU: .*could not start CUDA"):
        opened = create_language(bundle)
    assert opened.rows_device == "cpu"
    with pytest.raises(EngineError, match="could not start CUDA"):
        create_language(bundle, LanguageSettings(device="cuda"))


def test_a_package_for_the_cpu_alone_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"hivtp\[cuda\]"):
        create_language(bundle, LanguageSettings(device="cuda"))


def test_a_float32_decoder_runs_on_the_cpu_and_is_refused_on_a_gpu(pruned_bundle, monkeypatch):
    bundle = Bundle.open(pruned_bundle)
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    opened = create_language(bundle)
    assert type(opened) is OnnxRuntimeLanguage
    assert opened.rows_device is None
    with pytest.raises(EngineError, match=r"is fp32, made for the CPU.*--language-precision fp16 or int4-fp16"):
        create_language(bundle, LanguageSettings(device="cuda"))


def test_the_command_says_what_a_gpu_wants(pruned_bundle, capsys):
    assert main([str(pruned_bundle), "what", "--language-device", "cuda"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "export the bundle with --language-precision fp16 or int4-fp16" in output.err


def test_a_device_that_the_decoder_cannot_run_on_is_refused():
    with pytest.raises(SettingsError, match="runs on one of auto, cpu, cuda, not on 'cuda:1'"):
        LanguageSettings(device="cuda:1")


def test_embeddings_stay_where_engine_and_decoder_share_a_device(bundle, monkeypatch):
    engine = OnnxRuntimeCudaEngine(bundle.vision_file, SETTINGS, device="cpu")

    def stays(device: str | None) -> bool:
        pixels = np.zeros((1, 3, 64, 64), np.float32)
        [tile] = VisionStage(engine, bundle.manifest.vision).leaving_rows_on(device).encode(pixels)
        return isinstance(tile.embeds, DeviceRows)

    assert [stays(device) for device in ("cpu", "cuda", None)] == [True, False, False]
    # As of an engine that records its runs.
    monkeypatch.setattr(engine, "view_device", None)
    assert [stays(device) for device in ("cpu", "cuda", None)] == [False] * 3


@pytest.fixture(scope="module")
def gpu() -> DeviceContext:
    return open_device("cuda")


class Forced:
    """Takes given tokens, and notes the logits that the decoder gave for each."""

    def __init__(self, tokens: list[int]) -> None:
        self.num = len(tokens)
        self.logits: list[NDArray[np.float32]] = []
        self._tokens = iter(tokens)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        self.logits.append(logits.copy())
        return next(self._tokens)

    def is_near(self, other: Forced) -> bool:
        return relative_error(np.stack(self.logits), np.stack(other.logits)) < 1e-2


@pytest.fixture(scope="module")
def forced_alone(language: OnnxRuntimeDeviceLanguage) -> list[tuple[NDArray[np.float32], list[int], Forced]]:
    """Prompts, their greedy tokens on the CPU, and the logits there."""
    alone = []
    for seed, (length, num) in enumerate(((1, 9), (40, 2), (200, 5))):
        prompt = embeddings(length, seed)
        tokens = list(language.generate(prompt, num, greedy))
        along = Forced(tokens)
        list(language.generate(prompt, num, along))
        alone.append((prompt, tokens, along))
    return alone


@pytest.mark.gpu
def test_logits_on_a_gpu_are_near_those_of_the_cpu(bundle, gpu, forced_alone):
    on_gpu = open_language(bundle, gpu)
    for prompt, tokens, expected in forced_alone:
        found = Forced(tokens)
        list(on_gpu.generate(prompt, found.num, found))
        assert found.is_near(expected)


@pytest.mark.gpu
def test_a_batch_on_a_gpu_gives_what_each_gives_alone(bundle, gpu, forced_alone):
    found = [Forced(tokens) for _, tokens, _ in forced_alone]
    requests = [DecodeRequest(prompt, one.num, one) for (prompt, _, _), one in zip(forced_alone, found, strict=True)]
    list(open_language(bundle, gpu).generate_batch(requests))
    for one, (_, _, expected) in zip(found, forced_alone, strict=True):
        assert one.is_near(expected)


@pytest.mark.gpu
def test_a_cache_that_grows_on_a_gpu_keeps_what_it_holds(bundle, gpu, forced_alone):
    on_gpu = open_language(bundle, gpu)
    prompt, tokens, expected = forced_alone[2]
    cache, found = on_gpu.new_cache(), Forced(tokens)
    list(on_gpu.generate(prompt[:20], 2, greedy, cache))
    cache.cut(20)
    list(on_gpu.generate(prompt[20:], found.num, found, cache))
    assert found.is_near(expected)


@pytest.mark.gpu
def test_from_image_to_tokens_the_embeddings_never_leave_the_gpu(bundle, gpu, photo):
    pipeline = bound_pipeline(bundle, gpu)
    before = gpu.num_waits
    stream = pipeline.stream("what", [photo], max_new_tokens=1)
    list(stream)
    [image] = stream.images
    assert image.embeds.sources[0].owner.device_name() == "cuda"
    assert gpu.num_waits - before == (1 if gpu.has_stream else 3)
    by_host = bound_pipeline(bundle, gpu, is_bound=False)
    found, expected = (some.generate("what", [photo], max_new_tokens=8) for some in (pipeline, by_host))
    assert found.token_ids == expected.token_ids
    assert found.kept_indices == expected.kept_indices


@pytest.mark.gpu
def test_auto_takes_the_gpu(bundle, photo):
    pipeline = Pipeline.load(bundle.folder)
    assert pipeline.language.rows_device == "cuda"
    assert len(pipeline.generate("what", [photo], max_new_tokens=4).token_ids) == 4
