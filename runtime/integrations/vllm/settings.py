"""What the plugin prunes by: the field `hivtp` of a model's config, where `--hf-overrides` puts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from hivtp_ops import PRESETS, PruningSpec
from hivtp_ops.errors import SettingsError, SpecError

if TYPE_CHECKING:
    from typing import Self

    from hivtp.runtime.vision.packing import NewlineRule

FIELD = "hivtp"
NO_PRUNING = "none"
SPEC_FIELDS = tuple(field.name for field in fields(PruningSpec))
# Which rows keep a token follows from what an image shows; vLLM counts before it has looked.
NEWLINE_RULES: tuple[NewlineRule, ...] = ("all", "none")
EXAMPLE = '--hf-overrides \'{"architectures": [...], "hivtp": {"preset": "192"}}\''


@dataclass(frozen=True)
class PluginSettings:
    """How the images of a model are pruned.

    Attributes:
        spec: with its layers resolved and `keep` set; None prunes nothing.
        newline: LLaVA-NeXT: which rows of the unpadded image keep their newline token, "all" or "none".
        grid: rows and columns of patches in a tile.
        tile_size: side of a tile in pixels.
        feature_layers: whose outputs are the features, as `hidden_states` numbers them.
        num_prefix_tokens: 1 where the CLS is a feature.
        pinpoints: (height, width) of every tile grid in pixels; None for LLaVA-1.5, where an image is one tile.
    """

    spec: PruningSpec | None
    newline: NewlineRule
    grid: tuple[int, int]
    tile_size: int
    feature_layers: tuple[int, ...]
    num_prefix_tokens: int
    pinpoints: tuple[tuple[int, int], ...] | None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read a model's config.

        Args:
            config: of transformers, `LlavaConfig` or `LlavaNextConfig`, with a field `hivtp`.

        Raises:
            SettingsError: the field is missing or wrong, or the model is not one that the rule works on.
            SpecError: the rule does not fit the tower, or has no exact count.
        """
        values, tower = _given(config), config.vision_config
        is_next = config.model_type == "llava_next"
        _check_model(config, is_next=is_next)
        depth, side = tower.num_hidden_layers, tower.image_size // tower.patch_size
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        feature_layers = tuple(range(depth + 1)[layer] for layer in layers)
        newline = values.pop("newline", NEWLINE_RULES[0])
        if newline not in NEWLINE_RULES:
            raise SettingsError(
                f"hivtp: newline must be one of {', '.join(NEWLINE_RULES)}, not {newline!r}: vLLM makes room for an "
                "image before it is encoded, so its newlines must follow from its size"
            )
        spec = _spec(values, (side, side))
        if spec is not None:
            spec = _resolved(spec, depth, max(feature_layers))
        return cls(
            spec=spec,
            newline=cast("NewlineRule", newline),
            grid=(side, side),
            tile_size=tower.image_size,
            feature_layers=feature_layers,
            num_prefix_tokens=int(config.vision_feature_select_strategy == "full"),
            pinpoints=tuple((height, width) for height, width in config.image_grid_pinpoints) if is_next else None,
        )


def _given(config: Any) -> dict[str, Any]:
    values = getattr(config, FIELD, None)
    if values is None:
        raise SettingsError(
            f"this architecture of hivtp needs to know how to prune: give {EXAMPLE}, with one of "
            f'{", ".join(PRESETS.keys() - {"paper"})}; "preset": "{NO_PRUNING}" keeps every token'
        )
    if not isinstance(values, Mapping):
        raise SettingsError(f"hivtp must be an object of settings, not {values!r}; give {EXAMPLE}")
    known = ("preset", *SPEC_FIELDS, "newline")
    if unknown := sorted(set(values) - set(known)):
        raise SettingsError(f"hivtp has unknown settings {unknown}; there are {', '.join(known)}")
    return dict(values)


def _check_model(config: Any, *, is_next: bool) -> None:
    if config.model_type not in ("llava", "llava_next"):
        raise SettingsError(f"hivtp prunes llava and llava_next, and this model is a {config.model_type!r}")
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise SettingsError(
            f"the vision tower is a {tower!r}; the rule needs a clip_vision_model, which has a CLS token and a square "
            "grid of patches"
        )
    strategies = ["default"] if is_next else ["default", "full"]
    if config.vision_feature_select_strategy not in strategies:
        raise SettingsError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; hivtp prunes "
            f"{config.model_type} with {' or '.join(strategies)}"
        )
    if not is_next and not isinstance(config.vision_feature_layer, int):
        raise SettingsError(
            f"vision_feature_layer is {config.vision_feature_layer!r}; vLLM's LLaVA-1.5 takes the features of one layer"
        )
    if is_next and not isinstance(config.image_grid_pinpoints, Sequence):
        raise SettingsError(f"image_grid_pinpoints is {config.image_grid_pinpoints!r}, expected a list of sizes")


def _spec(values: Mapping[str, Any], grid: tuple[int, int]) -> PruningSpec | None:
    """The rule with an exact count; None where nothing is pruned."""
    preset = values.get("preset")
    rule = {name: value for name, value in values.items() if name != "preset"}
    if preset == NO_PRUNING:
        if rule:
            raise SettingsError(f'hivtp: "preset": "{NO_PRUNING}" keeps every token; leave {sorted(rule)} out')
        return None
    if preset is not None and not isinstance(preset, str):
        raise SettingsError(f'hivtp: preset must be a name, such as "192", not {preset!r}')
    spec = replace(PruningSpec() if preset is None else PruningSpec.preset(preset, grid), **rule)
    if spec.keep is None:
        raise SpecError(
            f"hivtp: {f'preset {preset!r}' if preset else 'this rule'} keeps more of one image than of another, and "
            "vLLM makes room for an image before it is encoded; take a preset with an exact count "
            f"({', '.join(sorted(PRESETS.keys() - {'paper'}, key=int))}), or set keep"
        )
    spec.validate(grid)
    return spec


def _resolved(spec: PruningSpec, depth: int, num_loaded: int) -> PruningSpec:
    """The spec with its layers, all of which vLLM loads: those up to the features."""
    spec = spec.resolve(depth)
    if spec.scoring_layers.stop > num_loaded:
        raise SpecError(
            f"scoring layers {spec.scoring_layers.start} to {spec.scoring_layers.stop - 1} reach beyond the features, "
            f"which are the output of the first {num_loaded} layers, and vLLM loads no others; set first_layer and "
            f"num_layers so that their sum is at most {num_loaded}"
        )
    return spec
