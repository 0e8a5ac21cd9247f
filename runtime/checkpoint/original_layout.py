"""Checkpoints in the layout of the original LLaVA code: their config as transformers would have it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hivtp.runtime.checkpoint.weight_files import Location

_CLASSES = re.compile(r"^Llava(Llama|Mistral|Mpt|Qwen|Phi|Gemma)\w*ForCausalLM$")
_TYPES = re.compile(r"^llava_(llama|mistral|mpt|qwen|phi|gemma)\w*$")
# What a language model is called there, and the keys of its config.
TEXT_TYPES = ("llama", "mistral")
_TEXT_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
)
_CLIP_LARGE: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
# The vision towers of OpenAI that a config may name, by the last part of that name.
KNOWN_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
PROJECTOR = "mlp2x_gelu"
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
EMBEDDINGS, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a config is one of the original code."""
    return "mm_vision_tower" in raw or _text_type(raw) is not None


def tower_name(raw: Mapping[str, Any]) -> str:
    """The last part of the name that a config gives its vision tower."""
    return str(raw.get("mm_vision_tower")).rstrip("/").rpartition("/")[2]


def converted(raw: Mapping[str, Any], vision_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config of the original code as one of LlavaConfig or LlavaNextConfig; its vocabulary is not yet lengthened.

    Args:
        raw: see `is_original`.
        vision_config: of the vision tower; None takes that of the tower that the config names, where it is known.

    Raises:
        CheckpointError: something that transformers' LLaVA does not have.
    """
    text_type = _text_type(raw) or "llama"
    is_tiled = raw.get("image_aspect_ratio") == "anyres"
    merging, strategy = raw.get("mm_patch_merge_type", "flat"), raw.get("mm_vision_select_feature", "patch")
    for is_refused, found in (
        (text_type not in TEXT_TYPES, f"a language model of type {text_type!r}"),
        (raw.get("mm_projector_type") != PROJECTOR, f"mm_projector_type {raw.get('mm_projector_type', 'linear')!r}"),
        (bool(raw.get("mm_use_im_start_end")), "tokens around its images (mm_use_im_start_end)"),
        (strategy not in _STRATEGIES, f"mm_vision_select_feature {strategy!r}"),
        (raw.get("image_aspect_ratio") not in (None, "square", "pad", "anyres"), "another image_aspect_ratio"),
        (merging != ("spatial_unpad" if is_tiled else "flat"), f"mm_patch_merge_type {merging!r}"),
    ):
        if is_refused:
            raise CheckpointError(
                f"it is in the layout of the original LLaVA code and has {found}; of that layout LLaVA-1.5 and "
                f"LLaVA-1.6 can be read, with a Llama or Mistral, a projector {PROJECTOR} and a CLIP vision tower. "
                "Take a conversion from https://huggingface.co/llava-hf where there is one"
            )
    config: dict[str, Any] = {
        "model_type": "llava_next" if is_tiled else "llava",
        "text_config": {"model_type": text_type, **{key: raw[key] for key in _TEXT_KEYS if key in raw}},
        "vision_config": dict(vision_config or KNOWN_TOWERS.get(tower_name(raw), _CLIP_LARGE)),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[strategy],
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
    }
    if is_tiled:
        config["image_grid_pinpoints"] = raw.get("image_grid_pinpoints")
    return config


def lengthened(locations: Mapping[str, Location], num_rows: int) -> dict[str, Location]:
    """The weights of a language model whose embeddings and head have this many rows; see Location.num_added_rows."""
    longer = {
        name: replace(location, num_added_rows=num_rows - location.shape[0])
        for name in (EMBEDDINGS, HEAD)
        if (location := locations.get(name)) is not None and location.shape and location.shape[0] < num_rows
    }
    return {**locations, **longer}


def _text_type(raw: Mapping[str, Any]) -> str | None:
    """The kind of language model that a config of the original code names; None where it is not one."""
    classes, kind = raw.get("architectures"), raw.get("model_type")
    names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    matches = [*map(_CLASSES.match, names), _TYPES.match(kind) if isinstance(kind, str) else None]
    return next((match[1].lower() for match in matches if match), None)
