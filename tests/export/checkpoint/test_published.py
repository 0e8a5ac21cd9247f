"""The layouts of published checkpoints, scaled down: a bundle of each answers as transformers does."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.published.checkpoints import PUBLISHED
from benchmarks.published.writer import make_published
from hivtp import LanguageOptions, Pipeline, Request, SamplingParams
from hivtp.export.checkpoint.onevision_processor import open_onevision_processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.integrations.transformers import prune
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from hivtp_ops import PruningSpec

QUESTION = "What is in the picture? Is it red, or black & white?"


# One of each kind of vision tower, language model and tiling.
KINDS = [
    "llava-hf/llava-interleave-qwen-0.5b-hf",
    "llava-hf/llava-next-72b-hf",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
]


@torch.inference_mode()
def answer_of_transformers(
    folder: Path, photo: Path, num_tokens: int, *, spec: PruningSpec | None = None, **options: Any
) -> list[int]:
    is_onevision = json.loads((folder / "config.json").read_text())["model_type"] == "llava_onevision"
    open_processor = open_onevision_processor if is_onevision else partial(AutoProcessor.from_pretrained, backend="pil")
    processor = open_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # Of those that have no processor_config.json.
    processor.patch_size = model.config.vision_config.patch_size
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    processor.num_additional_image_tokens = int(model.config.vision_config.model_type == "clip_vision_model")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    template = processor.chat_template
    if template is None:
        content, template = f"<image>\n{QUESTION}", processor.tokenizer.chat_template
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    has_bos = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    inputs = processor(text=text, images=load_image(photo), add_special_tokens=not has_bos, return_tensors="pt")
    with contextlib.nullcontext() if spec is None else prune(model, spec):
        outputs = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, **options)
    return outputs[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bundle_answers_as_transformers_does_with_the_same_folder(name: str, tmp_path: Path, photo: Path) -> None:
    folder = make_published(tmp_path / "checkpoint", name)
    export_bundle(folder, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        sampling = SamplingParams(max_new_tokens=12, temperature=0)
        answer = pipeline.generate(Request(QUESTION, [photo], sampling))
    expected = answer_of_transformers(folder, photo, 12)
    assert len(set(expected)) > 3
    assert answer.token_ids == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_bundle_answers_as_prune_does(name: str, tmp_path: Path, photo: Path) -> None:
    folder = make_published(tmp_path / "checkpoint", name)
    bundle = export_bundle(folder, tmp_path / "bundle", ExportSettings(preset="192"), is_quiet=True)
    with Pipeline.load(bundle.folder) as pipeline:
        answer = pipeline.generate(Request(QUESTION, [photo], SamplingParams(max_new_tokens=12, temperature=0)))
    spec = bundle.manifest.pruning
    expected = answer_of_transformers(folder, photo, 12, spec=spec)
    assert len(set(expected)) > 3
    assert answer.token_ids == expected
    assert answer.num_kept_tokens < answer.num_image_tokens


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_weights_are_exported_and_answer(name: str, precision: Any, tmp_path: Path, photo: Path) -> None:
    folder = make_published(tmp_path / "checkpoint", name)
    settings = ExportSettings(vision_precision="int8", language_precision=precision)
    bundle = export_bundle(folder, tmp_path / "bundle", settings, is_quiet=True)
    assert bundle.manifest.verification["language"]["quantization_error"] > 0
    with Pipeline.load(bundle.folder) as pipeline:
        sampling = SamplingParams(max_new_tokens=4, temperature=0, ignores_eos=True)
        assert len(pipeline.generate(Request(QUESTION, [photo], sampling)).token_ids) == 4


def test_the_sampling_defaults_of_a_qwen_are_followed(tmp_path: Path, photo: Path) -> None:
    """Those of Qwen2's own chat models, which checkpoints made from them may keep."""
    folder = make_published(tmp_path / "checkpoint", "llava-hf/llava-interleave-qwen-0.5b-hf")
    plain = answer_of_transformers(folder, photo, 12)
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    defaults = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3}
    edit_json(folder / "generation_config.json", eos_token_id=[eos, eos - 2], **defaults)
    settings = ExportSettings(is_pruned=False)
    bundle = export_bundle(folder, tmp_path / "bundle", settings, is_quiet=True)
    language = bundle.manifest.language
    assert language is not None
    assert language.eos_token_ids == (eos, eos - 2)
    assert asdict(language.sampling) == {name: value for name, value in defaults.items() if name != "do_sample"}
    with Pipeline.load(bundle.folder) as pipeline:
        answer = pipeline.generate(Request(QUESTION, [photo], SamplingParams(max_new_tokens=12, temperature=0)))
    assert answer.token_ids == answer_of_transformers(folder, photo, 12) != plain


@torch.inference_mode()
def test_a_window_that_a_llama_does_not_have_is_of_no_matter(tmp_path: Path, photo: Path) -> None:
    """xtuner's Phi-3 is a Llama whose config names one.

    The attention of transformers' Llama looks at all positions. Its cache drops what lies before such a window, so the
    answer is compared with the one that it gives without a cache.
    """
    folder = make_published(tmp_path / "checkpoint", "xtuner/llava-phi-3-mini-hf")
    edit_json(folder / "config.json", lambda config: config["text_config"].update(sliding_window=20))
    export_bundle(folder, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    sampling = SamplingParams(max_new_tokens=6, temperature=0)
    expected = answer_of_transformers(folder, photo, 6, use_cache=False)
    for language in (None, LanguageOptions("transformers", checkpoint=folder)):
        with Pipeline.load(tmp_path / "bundle", language=language) as pipeline:
            assert pipeline.generate(Request(QUESTION, [photo], sampling)).token_ids == expected


def test_the_documentation_names_those_that_were_checked() -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    assert all(f"| `{name}` |" in page for name in PUBLISHED)
    assert page.count("| `llava-hf/") + page.count("| `xtuner/") == len(PUBLISHED)
