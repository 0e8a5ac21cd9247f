"""The rule in a loaded Hugging Face model, for those who stay in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from hivtp.runtime.integrations.transformers.image_pruner import EncodedImages, has_tiles
from hivtp.runtime.integrations.transformers.pruned_model import PrunedModel
from hivtp.runtime.vision.packing import NewlineRule
from hivtp.runtime.vision.tower_kinds import TOWER_KINDS
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from hivtp.runtime.integrations.transformers.image_pruner import Llava
    from hivtp_ops import PruningSpec

__all__ = ["EncodedImages", "PrunedModel", "prune"]


def prune(model: Llava, spec: PruningSpec, *, newline: NewlineRule = "kept-rows") -> PrunedModel:
    """Make a model prune, until `restore` or the end of a `with` block.

    Nothing but this model changes, and of it only `generate` and a hook before `forward`; its attention
    implementation stays, as does every other model. For transformers 5.16 to 5.23.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision with a CLIP or SigLIP vision tower, on any device and of any
            dtype.
        spec: the settings; its layers may be left open.
        newline: where images are tiled: which rows of the unpadded image keep their newline token: those that kept a
            patch, all, or none.

    Raises:
        SettingsError: the model is of another class, has another vision tower or select strategy, or is pruned
            already; or there is no such newline rule.
        SpecError: the spec does not fit the tower or its grid.
    """
    import transformers

    kinds = (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaNextForConditionalGeneration,
        transformers.LlavaOnevisionForConditionalGeneration,
    )
    if not isinstance(model, kinds):
        raise SettingsError(
            f"cannot prune a {type(model).__name__}; expected a LlavaForConditionalGeneration, "
            "LlavaNextForConditionalGeneration or LlavaOnevisionForConditionalGeneration of transformers"
        )
    if isinstance(getattr(model.generate, "__self__", None), PrunedModel):
        raise SettingsError("this model is pruned already; call restore() on what prune() gave before pruning again")
    tower, strategy = model.model.vision_tower, model.config.vision_feature_select_strategy
    kind = TOWER_KINDS.get(tower.config.model_type)
    if kind is None:
        raise SettingsError(
            f"the vision tower is a {type(tower).__name__}; the rule is known for a CLIPVisionModel and a "
            "SiglipVisionModel"
        )
    # Without a class token, "default" would drop the first patch; tiles have patches alone.
    if strategy == "default" and not kind.num_class_tokens:
        raise SettingsError(
            f"vision_feature_select_strategy 'default' drops the first patch of a {type(tower).__name__}, which has no "
            "class token; expected 'full'"
        )
    if strategy == "full" and kind.num_class_tokens and has_tiles(model):
        raise SettingsError(f"vision_feature_select_strategy {strategy!r} is not supported for {type(model).__name__}")
    if newline not in get_args(NewlineRule):
        raise SettingsError(f"newline must be one of {', '.join(get_args(NewlineRule))}, not {newline!r}")
    side = tower.config.image_size // tower.config.patch_size
    spec.validate((side, side))
    return PrunedModel(model, spec.resolve(tower.config.num_hidden_layers), (side, side), newline)
