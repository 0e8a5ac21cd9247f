"""The language backend transformers: the same tokens as the bundle's own decoder."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hivtp.engines.view import View

from benchmarks.checkpoints import make_checkpoint
from hivtp import Answer, Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.cli.run import main
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.language import torch_rows
from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.language.sampling import Sampler, SamplingSettings
from hivtp_ops.errors import CheckpointError, EngineError, MissingExtraError, OutOfMemoryError, SettingsError
from tests.support.answers import alone, assert_same_alone, assert_same_together, greedy, same

if TYPE_CHECKING:
    from pathlib import Path

NUM_TOKENS = 16
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")


@dataclass(frozen=True)
class Both:
    """One bundle, answered by its own decoder and by its checkpoint in transformers."""

    checkpoint: Path
    onnxruntime: Pipeline
    transformers: Pipeline


def load_both(checkpoint: Path, bundle: Path, **settings: Any) -> Both:
    own = Pipeline.load(bundle, num_threads=1)
    other = Pipeline.load(bundle, num_threads=1, language="transformers", checkpoint=checkpoint, **settings)
    return Both(checkpoint, own, other)


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
        Request("What is in the picture?", [pictures[0]], NUM_TOKENS),
        Request("how many dogs", (), 7),
        Request("Is <image> brighter than <image>?", pictures[1:3], NUM_TOKENS),
        Request("where is it <image>", [pictures[3]], 1),
        Request("a " * 150, (), NUM_TOKENS),
        Request("What is in the picture?", [pictures[4]], 12, temperature=1.0, seed=5),
        Request("What is in the picture?", [pictures[0]], NUM_TOKENS),
    ]


@pytest.fixture
def broken_after_a_layer(llava: Both, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it is not empty, the model runs out of memory after it has written into its first layer's cache."""
    layer, switch = llava.transformers.language._decoder._model.model.layers[1], []
    forward = layer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if switch:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail)
    return switch


def test_answers_equal_those_of_the_bundles_decoder(both: Both, requests: list[Request]) -> None:
    assert_same_alone(both.transformers, both.onnxruntime, requests)


def test_answers_of_a_batch_equal_those_of_the_bundles_decoder(both: Both, requests: list[Request]) -> None:
    assert_same_together(both.transformers, both.onnxruntime, requests)


@pytest.fixture
def in_torch(both: Both) -> Pipeline:
    """The same with the vision graph in torch, too: embeddings stay tensors."""
    folder, settings = both.onnxruntime.bundle.folder, {"language": "transformers", "checkpoint": both.checkpoint}
    return Pipeline.load(folder, num_threads=1, engine="torch", image_cache_bytes=0, **settings)


def test_with_the_vision_graph_in_torch_the_answers_are_the_same(
    both: Both, in_torch: Pipeline, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    pick = torch_rows._pick
    monkeypatch.setattr(torch_rows, "_pick", lambda source, *rest: sources.append(type(source)) or pick(source, *rest))
    assert_same_alone(in_torch, both.onnxruntime, requests)
    assert_same_together(in_torch, both.onnxruntime, requests)
    # Newlines of LLaVA-NeXT are an array of the bundle.
    assert View in sources
    assert set(sources) <= {View, np.ndarray}


def test_conversations_equal_those_with_the_bundles_decoder(both: Both, photos: Path) -> None:
    chats = [both.onnxruntime.chat(), both.transformers.chat()]
    turns = [("What is in the picture?", [PHOTOS[0]]), ("how many dogs", []), ("or rather <image>", [PHOTOS[1]])]
    for prompt, names in [*turns, ("why", [])]:
        images = [load_image(photos / name).resize((90, 70)) for name in names]
        first, second = (chat.ask(prompt, images, max_new_tokens=NUM_TOKENS) for chat in chats)
        assert same(first, second)
    assert chats[0].turns == chats[1].turns
    assert chats[0]._cache.length == chats[1]._cache.length > 150


def test_a_further_question_computes_only_what_is_new(llava: Both, photo: Path, monkeypatch) -> None:
    decoder, lengths = llava.transformers.language._decoder, []
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda embeds, *rest: lengths.append(len(embeds)) or run(embeds, *rest))
    chat = llava.transformers.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=1)
    chat.ask("how many dogs", max_new_tokens=1)
    assert len(lengths) == 2
    assert lengths[1] < 40 < lengths[0]


def test_pieces_of_a_stream_are_the_text(llava: Both, photo: Path) -> None:
    streams = [
        pipeline.stream("What is it?", [photo], max_new_tokens=NUM_TOKENS)
        for pipeline in (llava.onnxruntime, llava.transformers)
    ]
    first, second = (list(stream) for stream in streams)
    assert first == second
    assert "".join(second) == streams[1].answer.text


def test_random_sequences_of_a_batch_give_what_they_give_alone(llava: Both, monkeypatch) -> None:
    language = llava.transformers.language
    monkeypatch.setattr(language, "manifest", replace(language.manifest, eos_token_ids=tuple(range(40))))
    random = np.random.default_rng(3)
    for _ in range(6):
        sequences = [
            (random.normal(size=(random.integers(1, 400), 64)).astype(np.float32), int(random.integers(1, 60)), seed)
            for seed in range(random.integers(1, 7))
        ]

        def sampler(seed: int) -> Sampler:
            return Sampler(SamplingSettings(temperature=seed % 2, seed=seed))

        tokens: list[list[int]] = [[] for _ in sequences]
        for step in language.generate_batch([DecodeRequest(embeds, num, sampler(n)) for embeds, num, n in sequences]):
            for index, token_id in step.items():
                tokens[index].append(token_id)
        assert tokens == [list(language.generate(embeds, num, sampler(n))) for embeds, num, n in sequences]


def test_an_empty_batch_has_no_steps(llava: Both) -> None:
    assert list(llava.transformers.language.generate_batch([])) == []


def test_the_context_bounds_an_answer(llava: Both) -> None:
    language = llava.transformers.language
    embeds = np.random.default_rng(0).normal(size=(509, 64)).astype(np.float32)
    assert len(list(language.generate(embeds, 40, greedy))) == 3
    assert [list(step) for step in language.generate_batch([DecodeRequest(embeds, 40, greedy)])] == [[0]] * 3


@pytest.mark.parametrize("failing_step", [0, 5])
@pytest.mark.parametrize(("raised", "kind"), [(torch.OutOfMemoryError, OutOfMemoryError), (RuntimeError, EngineError)])
def test_a_sequence_that_fails_costs_only_its_request(
    llava: Both, requests: list[Request], monkeypatch, failing_step, raised, kind
) -> None:
    """In its prefill, and in a later step, where the joint run fails with it, both after a layer has run."""
    pipeline = llava.transformers
    long = len(pipeline.prepare(requests[4].prompt, ()).token_ids)
    expected = [alone(pipeline, request) for request in requests]
    layer = pipeline.language._decoder._model.model.layers[1]
    forward = layer.forward

    def fail(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        # The first layer has its new positions by now.
        if (kwargs["position_ids"] == long + failing_step - 1).any():
            raise raised("no room")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail)
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
        each.ask("What is in the picture?", [photo], max_new_tokens=NUM_TOKENS)
    broken_after_a_layer.append(True)
    with pytest.raises(OutOfMemoryError, match="memory of cpu ran out in the language model: no room"):
        chat.ask("or rather", max_new_tokens=NUM_TOKENS)
    broken_after_a_layer.clear()
    answers = [each.ask("how many", max_new_tokens=NUM_TOKENS) for each in (chat, other)]
    assert same(*answers)
    assert chat.turns == other.turns


def test_only_the_language_model_is_loaded_in_the_dtype_asked_for(tmp_path: Path, photo: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text={"initializer_range": 0.2}, dtype="bfloat16")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True).folder
    both = load_both(checkpoint, bundle)
    assert same(
        *(pipeline.generate("what", [photo], max_new_tokens=9) for pipeline in (both.onnxruntime, both.transformers))
    )
    for dtype in ("bfloat16", "float16"):
        pipeline = load_both(checkpoint, bundle, language_dtype=dtype).transformers
        model = pipeline.language._decoder._model
        assert type(model).__name__ == "LlamaForCausalLM"
        assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
        answers = pipeline.generate_batch([Request("what", [photo], 9), Request("how many dogs", (), 5)])
        assert [len(answer.token_ids) for answer in answers] == [9, 5]


def test_a_tied_head_is_one_weight(tmp_path: Path) -> None:
    text = {"initializer_range": 0.2, "tie_word_embeddings": True}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=text, tie_word_embeddings=True)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True).folder
    both = load_both(checkpoint, bundle)
    model = both.transformers.language._decoder._model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert same(*(pipeline.generate("what", max_new_tokens=9) for pipeline in (both.onnxruntime, both.transformers)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "abacus"}, "no language backend is named 'abacus'; there are onnxruntime and transformers"),
        ({"language": "transformers"}, "needs a checkpoint: the Hugging Face folder"),
        ({"language": "transformers", "checkpoint": 3}, "checkpoint must be the path of a folder, not int"),
        (
            {"language": "transformers", "language_dtype": "int4"},
            "must be one of float32, bfloat16, float16, not 'int4'",
        ),
        ({"language": "transformers", "language_device": "abacus"}, "the device 'abacus' cannot be used"),
        ({"checkpoint": "folder"}, "checkpoint 'folder' belongs to the language backend transformers"),
        ({"language_device": "meta"}, "the bundle.s decoder runs on one of auto, cpu, cuda, not on .meta."),
        ({"language_dtype": "float16"}, "dtype 'float16' belongs to the language backend transformers"),
    ],
)
def test_settings_that_cannot_work_are_refused(llava: Both, settings: dict[str, Any], message: str) -> None:
    if settings.keys() & {"language_dtype", "language_device"} and settings.get("language"):
        settings = settings | {"checkpoint": llava.checkpoint}
    with pytest.raises(SettingsError, match=message):
        Pipeline.load(llava.onnxruntime.bundle.folder, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_is_refused(llava: Both) -> None:
    with pytest.raises(SettingsError, match=r"the device 'cuda' cannot be used.*also runs on 'cpu'"):
        load_both(llava.checkpoint, llava.onnxruntime.bundle.folder, language_device="cuda")


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
        (pickled, "holds only pickled weights"),
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_bundle_is_refused(llava: Both, tmp_path, damage, message) -> None:
    folder = shutil.copytree(llava.checkpoint, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_both(folder, llava.onnxruntime.bundle.folder)


@pytest.mark.parametrize("absent_package", ["torch", "transformers", "safetensors"])
def test_a_package_that_is_missing_is_named_with_its_extra(llava: Both, monkeypatch, absent_package: str) -> None:
    monkeypatch.setitem(sys.modules, absent_package, None)
    with pytest.raises(MissingExtraError, match=rf"{absent_package} is not installed.*'hivtp\[transformers\]'"):
        load_both(llava.checkpoint, llava.onnxruntime.bundle.folder)


def test_the_command_answers_with_a_checkpoint(llava: Both, photo: Path, capsys) -> None:
    arguments = [str(llava.onnxruntime.bundle.folder), "What is it?", "--image", str(photo), "--max-new-tokens", "9"]
    checkpoint = ["--checkpoint", str(llava.checkpoint)]
    assert main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--json", "--language", "transformers", *checkpoint, "--language-dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected["token_ids"]
    assert main([*arguments, *checkpoint]) == 1
    output = capsys.readouterr()
    assert (output.out, "belongs to the language backend transformers" in output.err) == ("", True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cuda_device_it_answers_as_on_the_cpu(both: Both, requests: list[Request], dtype: str) -> None:
    pipeline = load_both(
        both.checkpoint, both.onnxruntime.bundle.folder, language_device="cuda", language_dtype=dtype
    ).transformers
    assert {weight.device.type for weight in pipeline.language._decoder._model.parameters()} == {"cuda"}
    answers = pipeline.generate_batch(requests)
    assert all(isinstance(answer, Answer) for answer in answers)
    if dtype == "float32":
        expected = both.transformers.generate_batch(requests)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("is_fast", [False, True])
def test_on_a_gpu_the_answers_are_those_of_the_cpu(both: Both, requests: list[Request], is_fast: bool) -> None:
    pipeline = Pipeline.load(
        both.onnxruntime.bundle.folder,
        engine="torch-cuda",
        uses_cuda_graph=is_fast,
        image_cache_bytes=0,
        language="transformers",
        checkpoint=both.checkpoint,
        language_device="cuda",
        language_compile=is_fast,
    )
    assert_same_alone(pipeline, both.onnxruntime, requests)
    assert_same_together(pipeline, both.onnxruntime, requests)
    expected = [alone(both.onnxruntime, request) for request in requests]
    for answer, single in zip(pipeline.generate_each(requests), expected, strict=True):
        assert same(answer, single)
