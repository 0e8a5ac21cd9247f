"""The language backend transformers: the same tokens as the bundle's own decoder."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.checkpoints import make_checkpoint
from hivtp import Answer, LanguageOptions, Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import CheckpointError, EngineError, MissingExtraError, OutOfMemoryError, SettingsError
from tests.support.answers import PHOTOS, alone, ask, assert_same_alone, assert_same_together, at_most, load, same
from tests.support.decoding import embeddings

if TYPE_CHECKING:
    from pathlib import Path

NUM_TOKENS = 16


@dataclass(frozen=True)
class Both:
    """One bundle, answered by its own decoder and by its checkpoint in transformers."""

    checkpoint: Path
    onnxruntime: Pipeline
    transformers: Pipeline

    @property
    def bundle(self) -> Path:
        return self.onnxruntime.model.bundle.folder


def load_in_transformers(checkpoint: Path, bundle: Path, **options: Any) -> Pipeline:
    return load(bundle, backend="transformers", checkpoint=checkpoint, **options)


def load_both(checkpoint: Path, bundle: Path, **options: Any) -> Both:
    return Both(checkpoint, load(bundle), load_in_transformers(checkpoint, bundle, **options))


@pytest.fixture(scope="module")
def llava(tiny_checkpoint: Path, varying_bundle: Path) -> Both:
    """LLaVA-1.5 with a rule that keeps as many patches as the picture makes it."""
    return load_both(tiny_checkpoint, varying_bundle)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """LLaVA-NeXT with a Mistral whose attention sees 24 positions back."""
    folder = tmp_path_factory.mktemp("next")
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048, "sliding_window": 24}
    checkpoint = make_checkpoint(
        folder / "checkpoint", family="llava_next", language="mistral", text=text, max_shard_size="100KB"
    )
    bundle = export_bundle(checkpoint, folder / "bundle", ExportSettings(preset="192"), is_quiet=True)
    return load_both(checkpoint, bundle.folder)


@pytest.fixture(params=["llava", "llava_next"])
def both(request: pytest.FixtureRequest) -> Both:
    pipelines: Both = request.getfixturevalue(request.param)
    return pipelines


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    """Of all kinds, with pictures of all shapes."""
    sizes = [(150, 60), (64, 64), (50, 130), (300, 40), (120, 120)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=True)]
    return [
        ask("What is in the picture?", [pictures[0]], NUM_TOKENS),
        ask("how many dogs", (), 7),
        ask("Is <image> brighter than <image>?", pictures[1:3], NUM_TOKENS),
        ask("where is it <image>", [pictures[3]], 1),
        ask("a " * 150, (), NUM_TOKENS),
        ask("What is in the picture?", [pictures[4]], 12, temperature=1.0, seed=5),
        ask("What is in the picture?", [pictures[0]], NUM_TOKENS),
    ]


@pytest.fixture
def second_layer(llava: Both) -> Any:
    return llava.transformers.model.language._model.model.layers[1]


@pytest.fixture
def broken_after_a_layer(second_layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it is not empty, the model runs out of memory after it has written into its first layer's cache."""
    forward, switch = second_layer.forward, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        if switch:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **kwargs)

    monkeypatch.setattr(second_layer, "forward", fail)
    return switch


def test_answers_equal_those_of_the_bundles_decoder(both: Both, requests: list[Request]) -> None:
    assert_same_alone(both.transformers, both.onnxruntime, requests)
    assert_same_together(both.transformers, both.onnxruntime, requests)


def test_conversations_equal_those_with_the_bundles_decoder(both: Both, photos: Path) -> None:
    chats = [both.onnxruntime.chat(), both.transformers.chat()]
    turns = [("What is in the picture?", [PHOTOS[0]]), ("how many dogs", []), ("or rather <image>", [PHOTOS[1]])]
    for prompt, names in [*turns, ("why", [])]:
        images = [load_image(photos / name).resize((90, 70)) for name in names]
        first, second = (chat.ask(prompt, images, at_most(NUM_TOKENS)) for chat in chats)
        assert same(first, second)
    assert [message.text for message in chats[0].history] == [message.text for message in chats[1].history]
    held = [chat._scheduler._slots.length(0) for chat in chats]
    assert held[0] == held[1] > 150


def test_a_further_question_computes_only_what_is_new(llava: Both, photo: Path, monkeypatch) -> None:
    model, lengths = llava.transformers.model.language._model, []
    forward = model.forward

    def counted(*args: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        lengths.append(inputs_embeds.shape[1])
        return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    chat = llava.transformers.chat()
    chat.ask("What is in the picture?", [photo], at_most(1))
    chat.ask("how many dogs", (), at_most(1))
    assert len(lengths) == 2
    assert lengths[1] < 40 < lengths[0]


def test_pieces_of_a_stream_are_the_text(llava: Both, photo: Path) -> None:
    streams = [
        pipeline.stream("What is it?", [photo], at_most(NUM_TOKENS))
        for pipeline in (llava.onnxruntime, llava.transformers)
    ]
    first, second = (list(stream) for stream in streams)
    assert first == second
    assert "".join(second) == streams[1].answer.text


@pytest.mark.parametrize("failing_step", [0, 5])
@pytest.mark.parametrize(("raised", "kind"), [(torch.OutOfMemoryError, OutOfMemoryError), (RuntimeError, EngineError)])
def test_a_sequence_that_fails_costs_only_its_request(
    llava: Both, requests: list[Request], second_layer, monkeypatch, failing_step, raised, kind
) -> None:
    """In its prefill, and in a later step, where the joint run fails with it, both after a layer has run."""
    pipeline = llava.transformers
    long = len(pipeline.model.prepare(requests[4]).token_ids)
    expected = [alone(pipeline, request) for request in requests]
    forward = second_layer.forward

    def fail(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        # The first layer has its new positions by now.
        if (kwargs["position_ids"] == long + failing_step - 1).any():
            raise raised("no room")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(second_layer, "forward", fail)
    answers = pipeline.generate_batch(requests)
    assert isinstance(answers[4], kind)
    assert "no room" in str(answers[4])
    del answers[4], expected[4]
    assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))


def test_without_memory_to_stack_the_caches_sequences_step_alone(
    llava: Both, requests: list[Request], monkeypatch
) -> None:
    expected = [alone(llava.transformers, request) for request in requests]

    def no_room(*_args: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.nn.functional, "pad", no_room)
    answers = llava.transformers.generate_batch(requests)
    assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))


def test_a_turn_that_fails_leaves_the_chat_as_it_was(
    llava: Both, photo: Path, broken_after_a_layer: list[bool]
) -> None:
    chat, other = llava.transformers.chat(), llava.transformers.chat()
    for each in (chat, other):
        each.ask("What is in the picture?", [photo], at_most(NUM_TOKENS))
    broken_after_a_layer.append(True)
    with pytest.raises(OutOfMemoryError, match="memory of cpu ran out in the language model: no room"):
        chat.ask("or rather", (), at_most(NUM_TOKENS))
    broken_after_a_layer.clear()
    answers = [each.ask("how many", (), at_most(NUM_TOKENS)) for each in (chat, other)]
    assert same(*answers)
    assert chat.history == other.history


def test_the_memory_of_a_slot_is_that_of_its_positions(llava: Both) -> None:
    """Also after it was stacked with others, and after it was truncated."""
    language = llava.transformers.model.language
    slots = language.open_slots(3, 100)

    def num_bytes() -> int:
        caches = [*slots._caches, *([] if slots._joint is None else [slots._joint.cache])]
        tensors = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return sum(
            {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values()
        )

    for slot, length in enumerate((20, 50, 10)):
        slots.prefill(slot, embeddings(length), length)
    assert num_bytes() == 80 * language.kv_bytes_per_position
    slots.step([0, 1, 2], embeddings(3))
    assert num_bytes() == 3 * 51 * language.kv_bytes_per_position
    slots.step([0, 2], embeddings(2))
    assert num_bytes() == (2 * 22 + 51) * language.kv_bytes_per_position
    slots.step([0], embeddings(1))
    assert num_bytes() == (23 + 51 + 12) * language.kv_bytes_per_position
    for slot in range(3):
        slots.truncate(slot, 0)
    assert num_bytes() == 0


def test_only_the_language_model_is_loaded_in_the_dtype_asked_for(tmp_path: Path, photo: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text={"initializer_range": 0.2}, dtype="bfloat16")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True).folder
    both = load_both(checkpoint, bundle)
    assert same(*(pipeline.generate("what", [photo], at_most(9)) for pipeline in (both.onnxruntime, both.transformers)))
    for dtype in ("bfloat16", "float16"):
        pipeline = load_in_transformers(checkpoint, bundle, dtype=dtype)
        model = pipeline.model.language._model
        assert type(model).__name__ == "LlamaForCausalLM"
        assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
        assert (
            2 * pipeline.model.language.kv_bytes_per_position == both.transformers.model.language.kv_bytes_per_position
        )
        answers = pipeline.generate_batch([ask("what", [photo], 9), ask("how many dogs", (), 5)])
        assert [len(answer.token_ids) for answer in answers] == [9, 5]


def test_a_tied_head_is_one_weight(tmp_path: Path) -> None:
    text = {"initializer_range": 0.2, "tie_word_embeddings": True}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=text, tie_word_embeddings=True)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True).folder
    both = load_both(checkpoint, bundle)
    model = both.transformers.model.language._model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert same(*(pipeline.generate("what", (), at_most(9)) for pipeline in (both.onnxruntime, both.transformers)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "abacus"}, "no language backend is named 'abacus'; there are onnxruntime, openvino"),
        ({"backend": "transformers"}, "needs a checkpoint: the Hugging Face folder"),
        ({"backend": "transformers", "checkpoint": 3}, "checkpoint must be the path of a folder, not a int"),
        (
            {"backend": "transformers", "checkpoint": "c", "dtype": "int4"},
            "must be one of float32, bfloat16, float16, not 'int4'",
        ),
        ({"checkpoint": "folder"}, "checkpoint 'folder' belongs to the language backend transformers"),
        ({"device": "meta"}, "onnxruntime runs the bundle.s decoder on one of auto, cpu, cuda, not on .meta."),
        ({"dtype": "float16"}, "dtype 'float16' belongs to the language backend transformers"),
        ({"num_threads": 0}, "num_threads must be a whole number from 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LanguageOptions(**options)


@pytest.mark.parametrize("device", ["abacus", "cuda"])
def test_a_device_that_is_not_there_is_refused(llava: Both, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SettingsError, match=rf"the device '{device}' cannot be used.*also runs on 'cpu'"):
        load_in_transformers(llava.checkpoint, llava.bundle, device=device)


def other_weights(folder: Path) -> None:
    make_checkpoint(folder, text={"initializer_range": 0.2}, seed=1)


def other_family(folder: Path) -> None:
    make_checkpoint(folder, family="llava_next", text={"initializer_range": 0.2})


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


def absent(folder: Path) -> None:
    shutil.rmtree(folder)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_weights, "is not the checkpoint of this llava bundle, which was exported from 'checkpoint'"),
        (other_family, "is not the checkpoint of this llava bundle"),
        (other_config, "is not the checkpoint of this llava bundle"),
        (absent, "is not a folder; give the folder of the checkpoint 'checkpoint'"),
        (without_config, "has no config.json; give the folder of the checkpoint 'checkpoint'"),
        (cut, "is truncated or not a safetensors file"),
        (pickled, "holds no weights"),
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_bundle_is_refused(llava: Both, tmp_path, damage, message) -> None:
    folder = shutil.copytree(llava.checkpoint, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_in_transformers(folder, llava.bundle)


@pytest.mark.parametrize("absent_package", ["torch", "transformers", "safetensors"])
def test_a_package_that_is_missing_is_named_with_its_extra(llava: Both, monkeypatch, absent_package: str) -> None:
    monkeypatch.setitem(sys.modules, absent_package, None)
    with pytest.raises(MissingExtraError, match=rf"{absent_package} is not installed.*'hivtp\[transformers\]'"):
        load_in_transformers(llava.checkpoint, llava.bundle)


def test_a_closed_model_says_so(llava: Both) -> None:
    language = load_in_transformers(llava.checkpoint, llava.bundle).model.language
    language.close()
    language.close()
    for use in (lambda: language.embed([1]), lambda: language.open_slots(1, 10)):
        with pytest.raises(EngineError, match="this pipeline is closed; load the bundle again"):
            use()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cuda_device_it_answers_as_on_the_cpu(both: Both, requests: list[Request], dtype: str) -> None:
    """The vision tower runs there, too."""
    pipeline = load_in_transformers(both.checkpoint, both.bundle, device="cuda", dtype=dtype)
    model = pipeline.model
    assert {weight.device.type for weight in model.language._model.parameters()} == {"cuda"}
    assert type(model.images._encoder._vision.engine).__name__ == "TransformersVision"
    answers = pipeline.generate_batch(requests)
    assert all(isinstance(answer, Answer) for answer in answers)
    if dtype == "float32":
        assert_same_alone(pipeline, both.onnxruntime, requests)
        expected = both.transformers.generate_batch(requests)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert [answer.token_ids for answer in pipeline.generate_each(requests)] == [
            answer.token_ids for answer in expected
        ]
