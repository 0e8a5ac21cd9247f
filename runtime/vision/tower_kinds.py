"""The kinds of vision towers, and what tells one from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TowerKind:
    """A kind of vision tower.

    Attributes:
        model_type: of its config in transformers.
        title: as people call it.
        num_class_tokens: tokens in front of the patches that show no patch.
        has_pre_norm: whether its embeddings are normalised before the first layer.
        has_patch_bias: whether the projection of the patches has a bias.
    """

    model_type: str
    title: str
    num_class_tokens: int
    has_pre_norm: bool
    has_patch_bias: bool


CLIP = TowerKind("clip_vision_model", "CLIP", num_class_tokens=1, has_pre_norm=True, has_patch_bias=False)
SIGLIP = TowerKind("siglip_vision_model", "SigLIP", num_class_tokens=0, has_pre_norm=False, has_patch_bias=True)
# By the `model_type` of their configs.
TOWER_KINDS: Mapping[str, TowerKind] = {kind.model_type: kind for kind in (CLIP, SIGLIP)}
