"""A checkpoint of real size with random weights, written shard by shard and never whole in memory."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import SHAPES, make_config, model_class, write_processor

if TYPE_CHECKING:
    import torch

# From the names of a live model to those of the hub (transformers 4).
HUB_NAMES = (
    (re.compile(r"^model\.vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.image_newline"), "image_newline"),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
)


def hub_name(name: str) -> str:
    """The published name of a weight."""
    for pattern, replacement in HUB_NAMES:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    raise ValueError(f"no published name is known for {name!r}")


def random_weight(name: str, shape: torch.Size, gain: float, seed: int) -> torch.Tensor:
    """A weight at the scale at which transformers would start it, in float32."""
    import torch

    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    std = 0.02
    if "vision_tower" in name and re.search(r"[qk]_proj\.weight", name):
        std = gain * 0.02
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(std)


def write_large_checkpoint(
    folder: Path,
    shape: str = "7b",
    *,
    family: str = "llava",
    tower: str = "clip",
    language: str = "llama",
    dtype: str = "bfloat16",
    max_shard_bytes: int = 2 * 10**9,
    seed: int = 0,
    text: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint in the hub's layout and return its folder; one shard is in memory at a time.

    Each weight has a seed of its own, so that all cores draw at once. `text` overrides the language model's config.
    """
    import torch
    from safetensors.torch import save_file

    config = make_config(shape, family=family, tower=tower, language=language, text=text)
    with torch.device("meta"):
        weights = list(model_class(family)(config).named_parameters())
    torch_dtype = getattr(torch, dtype)
    gain = SHAPES[shape].attention_gain
    shards: list[list[tuple[str, torch.Size, int]]] = [[]]
    num_bytes = 0
    for index, (name, weight) in enumerate(weights):
        size = weight.numel() * torch_dtype.itemsize
        if shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append((name, weight.shape, seed + index))
        num_bytes += size

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def draw(weight: tuple[str, torch.Size, int]) -> tuple[str, torch.Tensor]:
        name, size, seed = weight
        return hub_name(name), random_weight(name, size, gain, seed).to(torch_dtype)

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = dict(threads.map(draw, shard))
            save_file(tensors, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            print(f"{file}: {len(tensors)} weights", flush=True)
    shard_index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard_index))
    config.architectures = [model_class(family).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    write_processor(folder, config)
    return folder


def main() -> None:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--family", choices=("llava", "llava_next", "llava_onevision"), default="llava")
    parser.add_argument("--tower", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--language", choices=("llama", "mistral", "qwen2"), default="llama")
    parser.add_argument("--layers", type=int, help="of the language model, instead of the shape's")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    write_large_checkpoint(
        options.folder,
        options.shape,
        family=options.family,
        tower=options.tower,
        language=options.language,
        dtype=options.dtype,
        text=None if options.layers is None else {"num_hidden_layers": options.layers},
    )
    print(f"wrote a {options.family} checkpoint of shape {options.shape!r} to {options.folder}")


if __name__ == "__main__":
    main()
