"""One name for a weight, whatever layout a checkpoint has it in."""

from __future__ import annotations

import re

# Weight names, from any layout, to `part.name`: the original code's, the hub's (transformers 4), those of a live model,
# and those that transformers 5 saves, which drop the tower's `vision_model.`.
_CANONICAL_NAMES = (
    # Of the original LLaVA code, whose projector is a Sequential.
    (re.compile(r"^model\.vision_tower\.vision_tower\.vision_model\.(.+)$"), r"vision.\1"),
    (re.compile(r"^model\.mm_projector\.0\.(.+)$"), r"projector.linear_1.\1"),
    (re.compile(r"^model\.mm_projector\.2\.(.+)$"), r"projector.linear_2.\1"),
    (re.compile(r"^model\.((?:layers|embed_tokens|norm)\..+)$"), r"language.model.\1"),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)$"), r"vision.\1"),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.(.+)$"), r"projector.\1"),
    (re.compile(r"^language_model\.(model\..+|lm_head\..+)$"), r"language.\1"),
    (re.compile(r"^model\.language_model\.(?:model\.)?(.+)$"), r"language.model.\1"),
    (re.compile(r"^(lm_head\..+)$"), r"language.\1"),
    (re.compile(r"^(?:model\.)?(image_newline)$"), r"\1"),
)
# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
# What training wraps around a model: in front of a name DataParallel and PEFT (with the adapter merged), at any module
# torch.compile, FSDP and activation checkpointing.
_OUTER_WRAPPERS = re.compile(r"^(?:(?:module|base_model\.model)\.)+")
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def canonical_name(name: str) -> str | None:
    """The canonical name of a weight in any published layout; None for what is not a weight of the model."""
    name = _OUTER_WRAPPERS.sub("", _WRAPPERS.sub("", name))
    if _BUFFERS.search(name):
        return None
    for pattern, replacement in _CANONICAL_NAMES:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return None
