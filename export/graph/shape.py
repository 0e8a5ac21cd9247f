"""The sizes of a vision tower that its graph, the manifest and the checks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hivtp.runtime.vision.tower_kinds import TOWER_KINDS


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower, and which of its features are used.

    Attributes:
        num_layers: its depth, layers after the features included.
        num_heads: of its attention.
        hidden_size: its width.
        image_size, patch_size: sides of a tile and of a patch in pixels; what is left of a tile is not seen.
        num_class_tokens: tokens in front of the patches, 0 or 1.
        feature_layer: `vision_feature_layer` of the config.
        has_cls_feature: whether the class token is a feature too.
        language_hidden_size: width of the language model.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    image_size: int
    patch_size: int
    num_class_tokens: int
    feature_layer: int
    has_cls_feature: bool
    language_hidden_size: int

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Read the sizes from the config of a LLaVA model in transformers."""
        vision = config.vision_config
        num_class_tokens = TOWER_KINDS[vision.model_type].num_class_tokens
        return cls(
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            hidden_size=vision.hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_class_tokens=num_class_tokens,
            feature_layer=config.vision_feature_layer,
            has_cls_feature=num_class_tokens > 0 and config.vision_feature_select_strategy == "full",
            language_hidden_size=config.text_config.hidden_size,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile within the tower."""
        return self.num_class_tokens + self.num_patches

    @property
    def num_prefix_tokens(self) -> int:
        """Features in front of the patches: the CLS where the strategy is "full", else none."""
        return int(self.has_cls_feature)

    @property
    def num_feature_layers(self) -> int:
        """How many encoder layers run before the features: `hidden_states[i]` is the output of i layers."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.num_layers + 1 + layer
