"""The layouts of published checkpoints, scaled down: a bundle of each answers as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.published.checkpoints import PUBLISHED
from benchmarks.published.writer import make_published
from hivtp import LanguageOptions, Pipeline, Request, SamplingParams
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from tests.support.folders import edit_json

QUESTION = "What is in the picture? Is it red, or black & white?"


@torch.inference_mode()
def answer_of_transformers(folder: Path, photo: Path, num_tokens: int, *, use_cache: bool = True) -> list[int]:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # Of those that have no processor_config.json.
    processor.patch_size = model.config.vision_config.patch_size
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    template = processor.chat_template
    if template is None:
        content, template = f"<image>\n{QUESTION}", processor.tokenizer.chat_template
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    has_bos = text.startswith(processor.tokenizer.bos_token)
    inputs = processor(text=text, images=load_image(photo), add_special_tokens=not has_bos, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, use_cache=use_cache)
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
