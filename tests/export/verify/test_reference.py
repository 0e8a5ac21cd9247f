from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint, write_processor
from hivtp import Pipeline, Request, SamplingParams
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.reference import vision_reference
from hivtp.runtime.inputs.images import load_image
from hivtp_ops import PruningSpec
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_checkpoint_that_was_saved_again_in_half_precision_works(
    tmp_path: Path, photo: Path, dtype: str, key: str
) -> None:
    """transformers then writes the dtype into the config of each part."""
    from tests.support.reference import HuggingFace

    first = make_checkpoint(tmp_path / "first", text={"initializer_range": 0.2})
    model = LlavaForConditionalGeneration.from_pretrained(first, dtype=getattr(torch, dtype))
    folder = tmp_path / "again"
    model.save_pretrained(folder)
    write_processor(folder, model.config)

    def rename(config: dict) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            assert part.pop("dtype") == dtype
            part[key] = dtype

    edit_json(folder / "config.json", rename)
    export_bundle(folder, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        answer = pipeline.generate(Request("What is red?", [photo], SamplingParams(max_new_tokens=8, temperature=0)))
    assert answer.token_ids == HuggingFace(folder).generate("What is red?", [load_image(photo)], max_new_tokens=8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_reference_computes_in_float32_whatever_the_config_says(tiny_checkpoint: Path, dtype: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    spec = PruningSpec().resolve(6)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    expected = vision_reference(checkpoint, spec, pixels)
    checkpoint.config.vision_config.dtype = dtype
    found = vision_reference(checkpoint, spec, pixels)
    np.testing.assert_array_equal(found.embeds, expected.embeds)
    np.testing.assert_array_equal(found.layer_importance, expected.layer_importance)
    # The config is left as it was.
    assert checkpoint.config.vision_config.dtype in (dtype, getattr(torch, dtype))
