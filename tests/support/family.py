"""LLaVA models of transformers with random weights, and what their pruned answers must be by plain means."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NUM_NEW = 8
GRID = (8, 8)
PAPER = PruningSpec()
EXACT = PruningSpec.preset("192", GRID)
# How many patches stay depends on the picture: 52 to 64 of 64.
VARYING = PruningSpec(global_ratio=0.75)
EVERYTHING = PruningSpec(keep=64)
SPECS = {"paper": PAPER, "exact": EXACT, "varying": VARYING, "layers": PruningSpec(first_layer=0, num_layers=2, keep=9)}
# One for each of the five tile grids of LLaVA-NeXT, in (width, height): square, wide, tall, very wide, very tall.
SIZES = [(120, 120), (150, 60), (50, 130), (300, 40), (30, 280)]
TEXTS = ["USER: <image>\nwhat is this? ASSISTANT:", "USER: <image>\nhow many red houses are there in the photo?"]


def picture(seed: int, size: tuple[int, int] = (120, 120)) -> Image.Image:
    """Blurred blobs of colour."""
    blobs = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


class Family:
    """A checkpoint: models of it, its processor, and what a pruned answer must be by plain means."""

    def __init__(self, folder: Path, kind: type, backend: str = "pil") -> None:
        self.folder = folder
        self.kind = kind
        self.processor = AutoProcessor.from_pretrained(folder, backend=backend)
        self.processor.tokenizer.pad_token = "<unk>"
        self.processor.tokenizer.padding_side = "left"
        self.reference = self.load()
        self.reference.model.vision_tower.set_attn_implementation("eager")
        self.num_class_tokens = int(hasattr(self.reference.model.vision_tower.embeddings, "class_embedding"))

    def load(self, **settings: Any) -> Any:
        model = self.kind.from_pretrained(self.folder, **{"dtype": torch.float32, **settings}).eval()
        # So that every answer has NUM_NEW tokens.
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, texts: str | Sequence[str], images: Sequence[Any]) -> dict[str, torch.Tensor]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.processor(text=texts, images=list(images) or None, padding=True, return_tensors="pt")

    @torch.no_grad()
    def embeds(
        self, inputs: dict[str, torch.Tensor], spec: PruningSpec, newline: str = "kept-rows"
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Embeddings [1, length, hidden] of one pruned prompt, and the kept patches of each tile."""
        model, config = self.reference, self.reference.config
        tower, side = model.model.vision_tower, config.vision_config.image_size
        first = self.num_class_tokens
        pixels, counts = inputs["pixel_values"], [1] * len(inputs["pixel_values"])
        if "image_sizes" in inputs:
            counts = [1 + int(np.prod(self.tile_grid(size))) for size in inputs["image_sizes"]]
            pixels = torch.cat([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])
        outputs = tower(pixels, output_attentions=True, output_hidden_states=True)
        spec = spec.resolve(config.vision_config.num_hidden_layers)
        attentions = outputs.attentions[spec.first_layer : spec.first_layer + spec.num_layers]
        importance = torch.stack(attentions).float().mean(dim=(0, 2, 3))[:, first:].numpy()

        # Every token of the unpruned sequence as tile * 100 + token, -1 for a newline.
        num_patches = (side // config.vision_config.patch_size) ** 2
        num_tokens = first + num_patches
        ids = [100.0 * tile + torch.arange(num_tokens)[:, None] for tile in range(len(pixels))]
        if "image_sizes" in inputs:
            ids = [
                torch.stack(ids[end - count : end])[:, first:]
                for count, end in zip(counts, np.cumsum(counts), strict=True)
            ]
            packed, _ = model.pack_image_features(ids, inputs["image_sizes"], "default", torch.tensor([-1.0]))
        else:
            packed = [tile[first * (config.vision_feature_select_strategy == "default") :] for tile in ids]
        sequence = [int(token) for image in packed for token in image[:, 0]]
        for tile, patch in itertools.product(range(len(pixels)), range(num_patches)):
            if tile * 100 + patch + first not in sequence:
                importance[tile, patch] = -np.inf
        selection = select(importance, GRID, spec)
        kept = [row[:count].tolist() for row, count in zip(selection.indices, selection.counts, strict=True)]

        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        rows: list[torch.Tensor | None] = []
        is_row_kept = False
        for position, token in enumerate(sequence):
            tile, place = divmod(token, 100)
            if token == -1:
                stays = {"kept-rows": is_row_kept, "all": True, "none": False}[newline]
                rows.append(model.model.image_newline if stays else None)
                is_row_kept = False
            else:
                stays = place < first or place - first in kept[tile]
                rows.append(model.model.multi_modal_projector(features[tile, place]) if stays else None)
                # The base tile has no rows that a newline could follow.
                is_row_kept |= stays and not self.is_base(position, counts, sequence)
        embeds = []
        remaining = iter(rows)
        for token in inputs["input_ids"][0]:
            row = next(remaining) if token == config.image_token_id else model.get_input_embeddings()(token)
            if row is not None:
                embeds.append(row)
        assert next(remaining, "end") == "end"
        return torch.stack(embeds)[None], kept

    def is_base(self, position: int, counts: list[int], sequence: list[int]) -> bool:
        bases = [100 * first for first in np.cumsum([0, *counts])[:-1].tolist()]
        return sequence[position] // 100 * 100 in bases

    def tile_grid(self, image_size: torch.Tensor) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(image_size.tolist(), self.reference.config.image_grid_pinpoints)
        side = self.reference.config.vision_config.image_size
        return height // side, width // side

    @torch.no_grad()
    def answer(self, inputs: dict[str, torch.Tensor], spec: PruningSpec, newline: str = "kept-rows") -> list[int]:
        """Greedy new tokens of one pruned prompt."""
        embeds, _ = self.embeds(inputs, spec, newline)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return self.reference.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False
        )[0].tolist()


def greedy(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[list[int]]:
    """New tokens of each row, once the prompt before them is what it was."""
    outputs = model.generate(**inputs, **{"max_new_tokens": NUM_NEW, "do_sample": False, **settings})
    length = inputs["input_ids"].shape[1]
    assert torch.equal(outputs[:, :length], inputs["input_ids"])
    return outputs[:, length:].tolist()


def make_family(folder: Path, kind: type, **settings: Any) -> Family:
    family = "llava_next" if kind is LlavaNextForConditionalGeneration else "llava"
    # Without it the next token of a model this small follows from the last one alone.
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    return Family(make_checkpoint(folder, "tiny", family=family, text=text, **settings), kind)
