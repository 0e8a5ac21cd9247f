"""LLaVA in transformers, as it is and pruned the paper's way, with its stages timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from benchmarks.timing.worker import Sample

UNPRUNED = "Hugging Face sdpa, unpruned"
PAPERS_WAY = "Hugging Face eager, the paper's way"
# What a user of either device takes.
DTYPES = {"cpu": "float32", "cuda": "float16"}


def load(checkpoint: Path, num_threads: int, tower_attention: str = "sdpa", device: str = "cpu") -> Any:
    """The LLaVA-1.5 or LLaVA-NeXT of a checkpoint, ready to run.

    Args:
        checkpoint: its folder.
        num_threads: of torch on the CPU.
        tower_attention: "sdpa", or "eager", which gives the attention out; the language model runs in sdpa.
        device: "cpu" or "cuda".
    """
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(num_threads)
    attention = {"": "sdpa", "text_config": "sdpa", "vision_config": tower_attention}
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=getattr(torch, DTYPES[device]), attn_implementation=attention
    )
    return model.to(device).eval()


def chat_prompt(processor: Any, question: str) -> str:
    """A question about one image, by the checkpoint's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


class StageClock:
    """Adds up the time of each stage of a pass.

    A GPU works on after a call has returned, so it is waited for before a time is read.

    Args:
        model: whose vision tower and projector are timed whenever they run.
    """

    def __init__(self, model: Any) -> None:
        self._device = model.device.type
        self._started: dict[str, float] = {}
        self._spent_ms: dict[str, float] = {}
        parts = {"tower_ms": model.model.vision_tower, "projector_ms": model.model.multi_modal_projector}
        for stage, module in parts.items():
            module.register_forward_pre_hook(lambda *_, stage=stage: self.start(stage))
            module.register_forward_hook(lambda *_, stage=stage: self.stop(stage))

    def now(self) -> float:
        """The time in seconds at which the device is done."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, stage: str) -> None:
        """A stage begins."""
        self._started[stage] = self.now()

    def stop(self, stage: str) -> None:
        """It ends; it may begin again in the same pass."""
        spent_ms = (self.now() - self._started.pop(stage)) * 1e3
        self._spent_ms[stage] = self._spent_ms.get(stage, 0.0) + spent_ms

    def take(self) -> Sample:
        """Milliseconds by stage since the last call."""
        spent, self._spent_ms = self._spent_ms, {}
        return spent


class PapersWay:
    """The steps of the published code (arXiv 2509.23663).

    Attention is materialised in all layers of the tower and all of them run, the selection goes through masks on the
    host, and the projector takes the kept patches. Unlike the published code it serves more than one tile.

    Args:
        model: from `load`, with eager attention in its tower.
        clock: that of the model.
    """

    def __init__(self, model: Any, clock: StageClock) -> None:
        from hivtp.export.graph.shape import VisionShape

        shape = VisionShape.of(model.config)
        spec = PruningSpec.preset("paper", shape.grid).resolve(shape.num_layers)
        assert spec.first_layer is not None, "resolve sets the layers"
        assert spec.num_layers is not None, "resolve sets the layers"
        self.model = model
        self.clock = clock
        self.grid = shape.grid
        self.scoring_layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The tokens [kept, hidden of the language model] of each tile, from pixels [tiles, 3, H, W]."""
        import torch

        parts = self.model.model
        outputs = parts.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        self.clock.start("selection_ms")
        importance = torch.stack(outputs.attentions[self.scoring_layers]).mean(dim=(0, 2, 3))[:, 1:]
        kept = [select_by_masks(scores, self.grid).to(pixels.device) for scores in importance.cpu()]
        self.clock.stop("selection_ms")
        features = outputs.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        return [
            parts.multi_modal_projector(tile[indices][None])[0] for tile, indices in zip(features, kept, strict=True)
        ]

    def embed(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings [1, length, hidden] of one prompt with one image, its pruned tokens in their place."""
        import torch

        [token_ids] = inputs["input_ids"]
        text = self.model.get_input_embeddings()(token_ids)
        places = (token_ids == self.model.config.image_token_id).nonzero()[:, 0]
        image = torch.cat(self.encode(inputs["pixel_values"]))
        return torch.cat([text[: places[0]], image, text[places[-1] + 1 :]])[None]


def select_by_masks(scores: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Preset "paper" as the published code selects: region by region, a mask for each, and a loop over its windows.

    Args:
        scores: [patches], on the host.
        grid: rows and columns, whose halves are even.

    Returns:
        Raster indices of the kept patches, in order.
    """
    import torch

    spec = PruningSpec.preset("paper", grid)
    rows, cols = grid[0] // spec.regions, grid[1] // spec.regions
    kept = torch.zeros(grid, dtype=torch.bool)
    for top in range(0, grid[0], rows):
        for left in range(0, grid[1], cols):
            region = scores.view(grid)[top : top + rows, left : left + cols].float()
            mask = torch.zeros(rows * cols, dtype=torch.bool)
            mask[region.flatten().topk(int(rows * cols * spec.global_ratio)).indices] = True
            mask = mask.view(rows, cols)
            rest = region.masked_fill(mask, -torch.inf)
            windows = torch.nn.functional.unfold(rest[None, None], spec.window, stride=spec.window)[0]
            best, places = windows.max(dim=0)
            for window, (score, place) in enumerate(zip(best, places, strict=True)):
                if score == -torch.inf:
                    continue
                row, col = divmod(window, cols // spec.window)
                below, beside = divmod(int(place), spec.window)
                mask[row * spec.window + below, col * spec.window + beside] = True
            kept[top : top + rows, left : left + cols] = mask
    return kept.flatten().nonzero()[:, 0]
