"""Configs of transformers as vLLM hands them to the plugin, in the sizes that are in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def tower(**changes: Any) -> SimpleNamespace:
    """CLIP ViT-L/14 at 336 pixels."""
    values = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
    return SimpleNamespace(**{**values, **changes})


def llava(hivtp: Any, **changes: Any) -> SimpleNamespace:
    """LLaVA-1.5; None leaves the field of the plugin out."""
    values = {
        "model_type": "llava",
        "vision_config": tower(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    field = {} if hivtp is None else {"hivtp": hivtp}
    return SimpleNamespace(**{**values, **field, **changes})


def llava_next(hivtp: Any, **changes: Any) -> SimpleNamespace:
    """LLaVA-NeXT, which is llava-v1.6."""
    return llava(hivtp, **{"model_type": "llava_next", "image_grid_pinpoints": PINPOINTS, **changes})
