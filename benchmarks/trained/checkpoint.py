"""A LLaVA checkpoint of trained parts: DINOv2 ViT-S/14, SmolLM2-135M, and between them a projector of random weights.

The projector is not trained, so the language model cannot read images; what rounding and pruning do to the tower and
to the language model is real.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.checkpoints import write_processor
from benchmarks.trained.gguf import read_gguf
from benchmarks.trained.packages import language_file, vision_file
from benchmarks.trained.smollm2 import llama_config, llama_weights, tokenizer_of
from benchmarks.trained.tower import RESIDUAL_SCALE, WIDTH, clip_config, clip_weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

IMAGE_SIZE = 336
# What DINOv2 was trained with.
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write_checkpoint(folder: Path, image_size: int = IMAGE_SIZE) -> Path:
    """Write the checkpoint in the Hugging Face format; images of 336 px have 24 x 24 patches, as LLaVA-1.5's.

    Raises:
        MissingExtraError: a package that ships a part is not installed.
    """
    import transformers
    from safetensors.torch import save_file

    metadata, tensors = read_gguf(language_file())
    text = transformers.LlamaConfig(**llama_config(metadata))
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**clip_config(image_size)),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    parts = {
        "vision_tower.vision_model.": clip_weights(vision_file(), image_size),
        "multi_modal_projector.": projector_weights(text.hidden_size),
        "language_model.": llama_weights(metadata, tensors),
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    weights = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_processor(folder, config, tokenizer_of(metadata))
    settings_file = folder / "preprocessor_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings |= {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    settings_file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def projector_weights(hidden_size: int) -> dict[str, torch.Tensor]:
    """Random weights that see the tower's features as DINOv2 has them: scaled down, without their mean."""
    import torch

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(hidden_size, WIDTH, generator=generator)
    first = (first - first.mean(dim=1, keepdim=True)) / WIDTH**0.5 / RESIDUAL_SCALE
    return {
        "linear_1.weight": first,
        "linear_1.bias": torch.randn(hidden_size, generator=generator) * 0.02,
        "linear_2.weight": torch.randn(hidden_size, hidden_size, generator=generator) / hidden_size**0.5,
        "linear_2.bias": torch.randn(hidden_size, generator=generator) * 0.02,
    }
