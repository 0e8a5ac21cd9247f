"""Images through vLLM's vision tower and projector, pruned between the two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.runtime.integrations.vllm.counts import layout_of
from hivtp.runtime.vision.token_blocks import Block, image_blocks, is_image_patch, project_kept
from hivtp.runtime.vision.torch_tower import attend, run_tower
from hivtp.runtime.vision.tower_kinds import CLIP
from hivtp_ops import torch_op

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from hivtp.runtime.integrations.vllm.settings import PluginSettings


class VllmLayers:
    """See LayerRunner: the layers of vLLM, which may hold some of the heads only.

    Args:
        sum_over_ranks: sums a tensor over the ranks among which heads are split.
    """

    def __init__(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._sum_over_ranks = sum_over_ranks

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See LayerRunner.run."""
        output: torch.Tensor = layer(hidden)
        return output

    def run_scoring(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerRunner.run_scoring."""
        attention = layer.self_attn
        projected, _ = attention.qkv_proj(layer.layer_norm1(hidden))
        mixed, received = attend(projected.chunk(3, dim=-1), attention.head_dim, attention.scale)
        if attention.tp_size > 1:
            # Each rank has as many heads as another, so the mean over all is that of the means.
            received = self._sum_over_ranks(received) / attention.tp_size
        # `out_proj` sums over the ranks by itself.
        attended, _ = attention.out_proj(mixed)
        hidden = hidden + attended
        return hidden + layer.mlp(layer.layer_norm2(hidden)), received


def encode_images(
    model: Any,
    settings: PluginSettings,
    layers: VllmLayers,
    pixel_values: torch.Tensor | Sequence[torch.Tensor],
    image_sizes: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The embeddings of images, each of as many tokens as `count_tokens` says.

    Args:
        model: vLLM's LLaVA-1.5 or LLaVA-NeXT.
        settings: with a spec.
        layers: runs the layers of its tower.
        pixel_values: LLaVA-1.5: [images, 3, H, W]; LLaVA-NeXT: for each image [tiles, 3, H, W], or all in one tensor,
            in which images with fewer tiles than another are padded with empty ones.
        image_sizes: LLaVA-NeXT: [images, 2], height and width of each image in pixels.
    """
    import torch

    assert settings.spec is not None, "an unpruned image is vLLM's to encode"
    tiles, blocks = _lay_out(settings, pixel_values, image_sizes)
    scoring = settings.spec.scoring_layers
    tower = model.vision_tower.vision_model
    features, importance = run_tower(tower, tiles, settings.feature_layers, scoring, layers)
    assert importance is not None, "the settings have scoring layers"
    # A tower that overflows gives nonsense with and without pruning; an error here would end the engine, and with
    # it the answers of everybody.
    importance = importance.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    shape = len(tiles), features.shape[1]
    is_padding = torch.from_numpy(~is_image_patch(blocks, shape, CLIP.num_class_tokens)).to(importance.device)
    importance = importance.masked_fill(is_padding, -torch.inf)
    kept_indices, _ = torch_op.prune(importance, settings.grid, settings.spec)
    newline = None if settings.pinpoints is None else model.image_newline
    tokens = project_kept(
        features, kept_indices, blocks, settings.newline, model.multi_modal_projector, newline, CLIP.num_class_tokens
    )
    sizes = np.array([flags.sum() for flags in tokens.is_kept]).reshape(len(pixel_values), -1).sum(axis=1)
    return list(torch.split(tokens.embeds, sizes.tolist()))


def _lay_out(
    settings: PluginSettings, pixel_values: torch.Tensor | Sequence[torch.Tensor], image_sizes: torch.Tensor | None
) -> tuple[torch.Tensor, list[Block]]:
    """Pixels of all tiles [tiles, 3, H, W], and where the unpruned tokens come from; see `image_blocks`."""
    import torch

    if settings.pinpoints is None:
        tiles = pixel_values if isinstance(pixel_values, torch.Tensor) else torch.stack(list(pixel_values))
        shape = len(tiles), 1 + math.prod(settings.grid)
        return tiles, [
            Block(row[None, 1 - settings.num_prefix_tokens :]) for row in np.arange(math.prod(shape)).reshape(shape)
        ]
    assert image_sizes is not None, "the processor of LLaVA-NeXT gives them"
    layouts = [layout_of(settings, (height, width)) for height, width in image_sizes.tolist()]
    images = zip(pixel_values, layouts, strict=True)
    tiles = torch.cat([pixels[: layout.num_tiles] for pixels, layout in images])
    return tiles, image_blocks(layouts, settings.grid, CLIP.num_class_tokens, None)
