"""LLaVA-OneVision in transformers, and what its pruned answers must be by plain means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.onevision_processor import open_onevision_processor
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

NUM_NEW = 8
SIDE = 8
# (width, height): one tile, some tiles, and views that are interpolated: a square of 6 x 6 tiles, and others.
SIZES = [(68, 68), (150, 60), (300, 40), (408, 408), (230, 400), (400, 300)]


class OneVision:
    """A checkpoint in transformers with its processor; greedy, without an end."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_checkpoint(
            folder,
            family="llava_onevision",
            tower="siglip",
            language="qwen2",
            text={"initializer_range": 0.2, "max_position_embeddings": 4096},
        )
        self.processor = open_onevision_processor(self.folder)
        self.model = self.load()

    def load(self) -> Any:
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """What a conversation with one message becomes: its images are a list of their own."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(self.processor(text=[text], images=[list(images)], return_tensors="pt"))

    @torch.inference_mode()
    def answer(self, inputs: dict[str, Any], model: Any = None) -> list[int]:
        tokens = (model or self.model).generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def answer_to_embeds(self, embeds: torch.Tensor) -> list[int]:
        mask = torch.ones(1, len(embeds), dtype=torch.int64)
        tokens = self.model.generate(
            inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False
        )
        return tokens[0].tolist()

    @torch.inference_mode()
    def pruned(self, inputs: dict[str, Any], spec: PruningSpec, newline: str) -> tuple[torch.Tensor, list[list[int]]]:
        """The shortened prompt [length, hidden], and the kept patches of each tile."""
        config, spec = self.model.config, spec.resolve(self.model.config.vision_config.num_hidden_layers)
        is_alone = int(inputs["batch_num_images"][0]) == 1
        kept: list[list[int]] = []
        pieces: list[list[torch.Tensor]] = []
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
            height, width = select_best_resolution(size, config.image_grid_pinpoints)
            side = config.vision_config.image_size
            shape = (height // side, width // side) if is_alone else (0, 0)
            tiles = pixels[: 1 + math.prod(shape)]
            outputs = self.model.model.vision_tower(tiles, output_attentions=True, output_hidden_states=True)
            maps = outputs.attentions[spec.first_layer : spec.first_layer + spec.num_layers]
            scores = torch.stack(maps).mean(dim=(0, 2, 3)).numpy()
            embeds = self.model.model.multi_modal_projector(outputs.hidden_states[-1])
            view = self._view(shape, size)
            if is_alone:
                is_image = np.isin(np.arange(scores.size).reshape(scores.shape), view)
                is_image[0] = True
                scores = np.where(is_image, scores, np.float32(-np.inf))
            selection = select(scores, (SIDE, SIDE), spec)
            of_image = [row[:count].tolist() for row, count in zip(selection.indices, selection.counts, strict=True)]
            kept += of_image
            stays = {tile * SIDE**2 + patch for tile, row in enumerate(of_image) for patch in row}
            pieces.append(self._tokens(embeds.flatten(0, 1), view, stays, newline))
        return self._prompt(inputs["input_ids"][0], pieces), kept

    def _view(self, shape: tuple[int, int], size: list[int]) -> np.ndarray:
        """The view without its padding [rows, cols], each patch as tile * 64 + patch; the base tile is tile 0."""
        rows, cols = shape
        view = np.zeros((rows * SIDE, cols * SIDE), np.float32)
        for row in range(rows * SIDE):
            for col in range(cols * SIDE):
                tile = 1 + row // SIDE * cols + col // SIDE
                view[row, col] = tile * SIDE**2 + row % SIDE * SIDE + col % SIDE
        return unpad_image(torch.from_numpy(view)[None], size)[0].int().numpy() if view.size else view.astype(int)

    def _tokens(self, embeds: torch.Tensor, view: np.ndarray, stays: set[int], newline: str) -> list[torch.Tensor]:
        end = self.model.model.image_newline
        tokens = [embeds[patch] for patch in range(SIDE**2) if patch in stays]
        if not view.size:
            return tokens if newline == "none" else [*tokens, end]
        rows, cols = view.shape
        ratio = math.sqrt(rows * cols / (9 * SIDE**2))
        size = (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)
        for row in range(size[0]):
            found = []
            for col in range(size[1]):
                parts = [
                    (weight, embeds[view[place]])
                    for place, weight in self._around(row, col, (rows, cols), size)
                    if view[place] in stays
                ]
                total = sum(weight for weight, _ in parts)
                if total > 0.5 - 1e-4:
                    found.append(sum(weight * embed for weight, embed in parts) / total)
            tokens += found
            if newline == "all" or (newline == "kept-rows" and found):
                tokens.append(end)
        return tokens

    @staticmethod
    def _around(
        row: int, col: int, shape: tuple[int, int], size: tuple[int, int]
    ) -> list[tuple[tuple[int, int], float]]:
        """The patches around the middle of a cell, and their bilinear weights, which sum to one."""
        axes = []
        for index, length, number in zip((row, col), shape, size, strict=True):
            middle = max((index + 0.5) * length / number - 0.5, 0.0)
            first = min(math.floor(middle), length - 1)
            share = middle - first
            axes.append([(first, 1 - share), (min(first + 1, length - 1), share)])
        return [((y, x), down * across) for y, down in axes[0] for x, across in axes[1]]

    def _prompt(self, ids: torch.Tensor, pieces: list[list[torch.Tensor]]) -> torch.Tensor:
        """The ids with each run of image tokens exchanged for the tokens of its image."""
        rows: list[torch.Tensor] = []
        remaining = iter(pieces)
        # Between the images of a prompt stands text.
        is_before = False
        for token in ids:
            is_image = int(token) == self.model.config.image_token_id
            if is_image and not is_before:
                rows += next(remaining)
            if not is_image:
                rows.append(self.model.get_input_embeddings()(token))
            is_before = is_image
        assert next(remaining, None) is None
        return torch.stack(rows)
