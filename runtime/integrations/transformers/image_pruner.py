"""Images through the vision tower and the projector of a transformers model, pruned between the two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.runtime.inputs.tile_layout import TileLayout
from hivtp.runtime.vision.interpolation import max_view_tiles
from hivtp.runtime.vision.token_blocks import Block, image_blocks, is_image_patch, project_kept
from hivtp.runtime.vision.torch_tower import run_tower
from hivtp.runtime.vision.tower_kinds import TOWER_KINDS
from hivtp_ops import torch_op
from hivtp_ops.errors import PromptError, ScoreError

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
    )

    from hivtp.runtime.vision.packing import NewlineRule
    from hivtp_ops import PruningSpec

    Llava: TypeAlias = (
        LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
    )


@dataclass(frozen=True)
class EncodedImages:
    """What is left of some images.

    Attributes:
        embeds: [num_kept_tokens, hidden], one image after the other, in the order of the unpruned tokens.
        is_kept: [num_unpruned_tokens] bool, which of the unpruned tokens those are, newlines included.
        kept_indices: [tiles, capacity] int64, as `hivtp_ops.torch_op.hierarchical_prune` gives them.
        kept_counts: [tiles] int64, as that function gives them.
        importance: [tiles, patches] float32, -inf in the padding of tiles.
    """

    embeds: torch.Tensor
    is_kept: torch.Tensor
    kept_indices: torch.Tensor
    kept_counts: torch.Tensor
    importance: torch.Tensor


class ImagePruner:
    """Encodes images as a model does, but for what the rule drops; leaves the model as it is.

    Args:
        model: see `prune`.
        spec: the settings, with their layers resolved.
        grid: rows and columns of patches in a tile.
        newline: see `prune`.
    """

    def __init__(self, model: Llava, spec: PruningSpec, grid: tuple[int, int], newline: NewlineRule) -> None:
        self.model = model
        self.spec = spec
        self.grid = grid
        self.newline = newline
        self.max_view_tiles = max_view_tiles(model.config)
        self.num_class_tokens = TOWER_KINDS[model.config.vision_config.model_type].num_class_tokens

    def encode(
        self, pixel_values: torch.Tensor, image_sizes: Any = None, batch_num_images: Any = None
    ) -> EncodedImages:
        """Run the vision tower and the projector, and prune between the two.

        The tower stops at the layer whose features are used, and the projector sees the kept tokens only.

        Args:
            pixel_values: as the processor gives them: [images, 3, H, W]; for tiled images
                [images, most tiles, 3, H, W] or [tiles, 3, H, W].
            image_sizes: for tiled images: [images, 2], height and width of each in pixels.
            batch_num_images: LLaVA-OneVision: images of each prompt; None takes each for the only one of its prompt.

        Raises:
            PromptError: pixels and sizes do not match.
            ScoreError: the importance scores hold NaN.
        """
        import torch

        model = self.model.model
        tiles, blocks = self._lay_out(pixel_values, image_sizes, batch_num_images)
        layers = model.config.vision_feature_layer
        num_layers = model.config.vision_config.num_hidden_layers
        wanted = [range(num_layers + 1)[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        features, importance = run_tower(model.vision_tower, tiles, wanted, self.spec.scoring_layers)
        assert importance is not None, "prune() resolves the scoring layers"
        shape = len(tiles), features.shape[1]
        is_padding = torch.from_numpy(~is_image_patch(blocks, shape, self.num_class_tokens)).to(importance.device)
        importance = importance.masked_fill(is_padding, -torch.inf)
        if importance.isnan().any():
            raise ScoreError("the importance scores hold NaN: the vision tower overflowed; load it in a wider dtype")
        kept_indices, kept_counts = torch_op.prune(importance, self.grid, self.spec)
        newline = model.image_newline if has_tiles(self.model) else None
        tokens = project_kept(
            features,
            kept_indices,
            blocks,
            self.newline,
            model.multi_modal_projector,
            newline,
            self.num_class_tokens,
        )
        is_kept = torch.from_numpy(np.concatenate(tokens.is_kept))
        return EncodedImages(tokens.embeds, is_kept, kept_indices, kept_counts, importance)

    def _lay_out(
        self, pixel_values: torch.Tensor, image_sizes: Any, batch_num_images: Any
    ) -> tuple[torch.Tensor, list[Block]]:
        """Pixels of all tiles [tiles, 3, H, W], and where the unpruned tokens come from; see `image_blocks`."""
        import torch

        config = self.model.config
        if not has_tiles(self.model):
            size = len(pixel_values), self.num_class_tokens + math.prod(self.grid)
            first = self.num_class_tokens * (config.vision_feature_select_strategy == "default")
            return pixel_values, [Block(np.arange(math.prod(size)).reshape(size)[:, first:])]

        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        if image_sizes is None:
            raise PromptError("tiled images need image_sizes beside pixel_values; pass both as the processor gave them")
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        layouts = []
        sizes = torch.as_tensor(image_sizes).tolist()
        numbers = [1] * len(sizes) if batch_num_images is None else torch.as_tensor(batch_num_images).tolist()
        are_alone = [number == 1 for number in numbers for _ in range(number)]
        if len(are_alone) != len(sizes):
            raise PromptError(
                f"batch_num_images counts {len(are_alone)} images and image_sizes has {len(sizes)}; pass both as the "
                "processor gave them"
            )
        for (height, width), is_alone in zip(sizes, are_alone, strict=True):
            if not is_alone:
                layouts.append(TileLayout(0, 0, (height, width)))
                continue
            rows, cols = get_anyres_image_grid_shape((height, width), pinpoints, side)
            layouts.append(TileLayout(rows, cols, (height, width)))
        if pixel_values.dim() == 5:
            # Images with fewer tiles than another are padded with empty ones.
            images = zip(pixel_values, layouts, strict=False)
            pixel_values = torch.cat([tiles[: layout.num_tiles] for tiles, layout in images])
        if len(pixel_values) != (num_tiles := sum(layout.num_tiles for layout in layouts)):
            raise PromptError(
                f"pixel_values holds {len(pixel_values)} tiles and image_sizes calls for {num_tiles}; "
                "pass both as the processor gave them"
            )
        return pixel_values, image_blocks(layouts, self.grid, self.num_class_tokens, self.max_view_tiles)


def has_tiles(model: Llava) -> bool:
    """Whether the model is LLaVA-NeXT or LLaVA-OneVision, which cut images into tiles."""
    return bool(model.config.model_type in ("llava_next", "llava_onevision"))
