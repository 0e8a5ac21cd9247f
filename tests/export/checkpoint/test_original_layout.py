"""Checkpoints as the original LLaVA code saves them: a bundle of one answers as its conversion does in transformers."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.checkpoints import make_checkpoint
from hivtp import LanguageOptions, Message, Pipeline, Request, SamplingParams, VisionOptions
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.original_layout.conversations import CONVERSATIONS, conversation_of
from hivtp.export.checkpoint.original_layout.layout import OriginalOptions
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.checkpoint.original_layout import KNOWN_TOWERS, converted
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.messages import ImagePart
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.integrations.transformers import prune
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json
from tests.support.original import convert, make_original

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp_ops import PruningSpec

QUESTION = "what is in the photo? Is it <s> red?"
NUM_TOKENS = 10
# Family, language model, whether the tower lies in the checkpoint, and the conversation that its kind has.
KINDS = {
    "v1.5": ("llava", "llama", False, "vicuna_v1"),
    "v1.6": ("llava_next", "llama", True, "vicuna_v1"),
    "v1.6 mistral": ("llava_next", "mistral", False, "mistral_instruct"),
}


class Pair:
    """A checkpoint, the tower beside it, and the conversion of both."""

    def __init__(self, folder: Path, kind: str) -> None:
        family, language, holds_tower, self.conversation = KINDS[kind]
        self.tower = folder / "tower"
        self.original = make_original(
            folder / "original", self.tower, family=family, language=language, holds_tower=holds_tower
        )
        template = CONVERSATIONS[self.conversation]
        self.converted = convert(self.original, self.tower, folder / "converted", template)
        self.settings = {"vision_tower": self.tower}

    @torch.inference_mode()
    def expected(self, photo: Path, spec: PruningSpec | None = None) -> list[int]:
        """What the conversion answers in transformers."""
        processor = AutoProcessor.from_pretrained(self.converted, backend="pil")
        model = AutoModelForImageTextToText.from_pretrained(self.converted, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        # One word of the question is a token of control, and is text in a bundle.
        question = QUESTION.replace("<s>", "<s")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=load_image(photo), return_tensors="pt")
        if spec is not None:
            prune(model, spec)
        outputs = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        return outputs[0, inputs["input_ids"].shape[1] :].tolist()


def answer(bundle: Path, photo: Path, **options: Any) -> list[int]:
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0, ignores_eos=True)
    with Pipeline.load(bundle, **options) as pipeline:
        return pipeline.generate(Request(QUESTION.replace("<s>", "<s"), [photo], sampling)).token_ids


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("original"), request.param)


@pytest.fixture(scope="module")
def v15(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("v15"), "v1.5")


@pytest.fixture
def broken(v15: Pair, tmp_path: Path) -> Path:
    return shutil.copytree(v15.original, tmp_path / "original")


def test_a_bundle_answers_as_the_conversion_does(pair: Pair, tmp_path: Path, photos: Path) -> None:
    """With and without pruning, of an image that is not square."""
    photo, names = photos / "coffee.png", ("unpruned", "pruned")
    settings = [ExportSettings(is_pruned=False, **pair.settings), ExportSettings(preset="192", **pair.settings)]
    for name, each in zip(names, settings, strict=True):
        bundle = export_bundle(pair.original, tmp_path / name, each, is_quiet=True)
        expected = pair.expected(photo, bundle.manifest.pruning)
        assert len(set(expected)) > 3
        assert answer(bundle.folder, photo) == expected
        # The language model in transformers, from the folder as it is.
        language = LanguageOptions("transformers", checkpoint=pair.original)
        assert answer(bundle.folder, photo, language=language) == expected


def test_it_has_what_the_conversion_has(pair: Pair) -> None:
    original = Checkpoint.open(pair.original, original=OriginalOptions(vision_tower=pair.tower))
    other = Checkpoint.open(pair.converted)
    assert original.locations.keys() - other.locations.keys() == set()
    for name in other.locations:
        assert torch.equal(original.tensor(name).float(), other.tensor(name).float()), name
    assert original.config.image_token_id == other.config.image_token_id == 400
    assert original.config.text_config.vocab_size == other.config.text_config.vocab_size == 448
    first, second = Processor.open(original), Processor.open(other)
    assert first.prompt == second.prompt
    assert first.tokenizer.backend_tokenizer.to_str() == second.tokenizer.backend_tokenizer.to_str()


def test_rounded_weights_are_exported_and_answer(pair: Pair, tmp_path: Path, photo: Path) -> None:
    for precision in ("int8", "int4"):
        settings = ExportSettings(vision_precision="int8", language_precision=precision, **pair.settings)
        bundle = export_bundle(pair.original, tmp_path / precision, settings, is_quiet=True)
        assert len(answer(bundle.folder, photo)) == NUM_TOKENS


def test_a_tower_that_the_checkpoint_holds_comes_before_that_of_the_folder(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "v1.6")
    weights = load_file(pair.tower / "model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, pair.tower / "model.safetensors")
    opened = Checkpoint.open(pair.original, original=OriginalOptions(vision_tower=pair.tower))
    assert opened.locations["vision.pre_layrnorm.weight"].file.parent == pair.original


def test_the_tower_of_another_folder_is_not_there_for_the_vision_engine_transformers(v15: Pair, tmp_path: Path) -> None:
    settings = ExportSettings(language_precision="none", **v15.settings)
    bundle = export_bundle(v15.original, tmp_path / "bundle", settings, is_quiet=True)
    with pytest.raises(CheckpointError, match="holds no vision tower, which the bundle has from another folder"):
        Pipeline.load(
            bundle.folder,
            vision=VisionOptions("transformers"),
            language=LanguageOptions("transformers", checkpoint=v15.original),
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(mm_projector_type="linear"), "mm_projector_type 'linear'"),
        (lambda config: config.pop("mm_projector_type"), "mm_projector_type 'linear'"),
        (lambda config: config.update(mm_use_im_start_end=True), "tokens around its images"),
        (lambda config: config.update(mm_vision_select_feature="slice4"), "mm_vision_select_feature 'slice4'"),
        (lambda config: config.update(image_aspect_ratio="anyres_max_9"), "another image_aspect_ratio"),
        (lambda config: config.update(image_aspect_ratio="anyres"), "mm_patch_merge_type 'flat'"),
        (lambda config: config.update(architectures=["LlavaMptForCausalLM"]), "a language model of type 'mpt'"),
        (lambda config: config.update(architectures=["LlavaQwenForCausalLM"]), "a language model of type 'qwen'"),
        (lambda config: config.update(vocab_size=0), "vocab_size of its text_config is 0"),
        (lambda config: config.update(hidden_size=65), "not a multiple of the number of attention heads"),
    ],
)
def test_what_transformers_does_not_have_is_refused(
    v15: Pair, broken: Path, edit: Callable[[dict], object], message: str
) -> None:
    edit_json(broken / "config.json", edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(broken, original=OriginalOptions(vision_tower=v15.tower))


def test_a_tower_that_is_not_there_is_asked_for(v15: Pair, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not say what that is; give .* --vision-tower FOLDER"):
        Checkpoint.open(broken)
    (bare := tmp_path / "bare").mkdir()
    shutil.copy(v15.tower / "config.json", bare)
    with pytest.raises(CheckpointError, match=r"does not hold its vision tower .* --vision-tower FOLDER"):
        Checkpoint.open(broken, original=OriginalOptions(vision_tower=bare))
    for folder, message in ((tmp_path / "none", "no config.json that can be read"), (broken, "is not a CLIP model")):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(broken, original=OriginalOptions(vision_tower=folder))


def test_a_tower_of_an_unknown_name_needs_its_config(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "v1.6")
    with pytest.raises(CheckpointError, match="and does not say what that is"):
        Checkpoint.open(pair.original)


def test_the_towers_that_are_known_have_the_sizes_of_openais() -> None:
    raw = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    vision = converted(raw)["vision_config"]
    assert (vision["image_size"], vision["hidden_size"], vision["num_hidden_layers"]) == (336, 1024, 24)
    assert vision["hidden_act"] == "quick_gelu"
    assert (
        converted({**raw, "mm_vision_tower": "/models/clip-vit-large-patch14/"})["vision_config"]
        == (KNOWN_TOWERS["clip-vit-large-patch14"])
    )


def test_weights_that_are_pickled_are_to_be_written_again(v15: Pair, broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights, .* torch\.load\(file, weights_only=True\)"):
        Checkpoint.open(broken, original=OriginalOptions(vision_tower=v15.tower))


def test_options_for_the_other_layout_are_refused(v15: Pair, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    for options in (OriginalOptions("vicuna_v1"), OriginalOptions(vision_tower=v15.tower)):
        with pytest.raises(CheckpointError, match="is in that of transformers; leave it out"):
            Checkpoint.open(folder, original=options)


TURNS = [
    Message("user", [ImagePart(b""), "What is it?"]),
    Message("assistant", ["A cat."]),
    Message("user", ["Why?"]),
]
SYSTEM = Message("system", ["Be brief."])
# What `Conversation.get_prompt` of the original code gives.
WRITTEN = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Why? ASSISTANT:",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Why? ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Why? [/INST]",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.\n"
    "<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s><s>[INST] Why? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?"
    "<|im_end|><|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_written_as_the_original_code_writes_it(v15: Pair, name: str) -> None:
    options = OriginalOptions(name, v15.tower)
    processor = Processor.open(Checkpoint.open(v15.original, original=options))
    template = PromptTemplate(**processor.prompt)
    try:
        assert template.render(TURNS, processor._runtime_tokenizer) == WRITTEN[name]
        with_system = template.render([SYSTEM, *TURNS], processor._runtime_tokenizer)
    finally:
        template.close()
    assert "Be brief." in with_system
    assert "assistant. " not in with_system
    assert with_system.endswith(WRITTEN[name][WRITTEN[name].index("What is it?") :])


def test_the_form_of_a_conversation_follows_the_kind() -> None:
    assert conversation_of(None, "mistral", has_chatml_tokens=True) == CONVERSATIONS["mistral_instruct"]
    assert conversation_of(None, "llama", has_chatml_tokens=True) == CONVERSATIONS["chatml_direct"]
    assert conversation_of(None, "llama", has_chatml_tokens=False) == CONVERSATIONS["vicuna_v1"]
    with pytest.raises(CheckpointError, match=r"no conversation form is named 'v9'; there are vicuna_v1, .*--conver"):
        conversation_of("v9", "llama", has_chatml_tokens=False)


def test_the_image_preprocessing_is_that_of_the_config(v15: Pair, broken: Path) -> None:
    found = {}
    for ratio in ("pad", "square"):
        edit_json(broken / "config.json", image_aspect_ratio=ratio)
        opened = Checkpoint.open(broken, original=OriginalOptions(vision_tower=v15.tower))
        found[ratio] = Processor.open(opened).image_processor
    assert found["pad"]["do_pad"]
    assert found["pad"]["image_processor_type"] == "LlavaImageProcessor"
    assert found["square"]["image_processor_type"] == "CLIPImageProcessor"


def test_the_config_of_the_original_code_is_written_as_published(v15: Pair) -> None:
    """So that these tests are of that layout."""
    config = json.loads((v15.original / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert "text_config" not in config
    names = load_file(v15.original / "model.safetensors").keys()
    assert {"model.embed_tokens.weight", "model.mm_projector.0.weight", "lm_head.weight"} <= names
    assert not [name for name in names if "vision_tower" in name]
