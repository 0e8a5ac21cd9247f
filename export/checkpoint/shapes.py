"""Whether a checkpoint's weights are those that its config asks for: each there, each of the right shape."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import FAMILIES
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hivtp.runtime.checkpoint.weight_files import Location

# Of a tower, for its pooled output, which LLaVA does not use.
UNUSED = ("post_layernorm.", "head.")
_LAYER = re.compile(r"^((?:vision\.encoder|language\.model)\.layers\.)(\d+)\.")


def check_shapes(place: object, config: Any, locations: Mapping[str, Location]) -> None:
    """Compare weights with what transformers' model of a config has.

    Args:
        place: of the checkpoint, for messages.
        config: its config.
        locations: its weights by their canonical names.

    Raises:
        CheckpointError: the first that is missing or of another shape.
    """
    try:
        single, depths = _shapes_of_one_layer(config)
    except Exception as error:
        raise CheckpointError(f"{place}: transformers cannot build a model of its config.json: {error}") from error
    missing = next((name for name, _ in _expanded(single, depths) if name not in locations), None)
    if missing is not None:
        raise CheckpointError(_missing(place, missing, depths, locations))
    for name, shape in _expanded(single, depths):
        found = locations[name].full_shape
        if found != shape:
            raise CheckpointError(
                f"{place}: {name!r} has shape {list(found)}, the config asks for {list(shape)}; "
                "config.json and the weights do not belong together"
            )


def _missing(place: object, name: str, depths: Mapping[str, int], locations: Mapping[str, Location]) -> str:
    match = _LAYER.match(name)
    if match is not None:
        layers = {found[2] for key in locations if (found := _LAYER.match(key)) and found[1] == match[1]}
        if 0 < len(layers) < depths[match[1]]:
            part = "vision tower" if name.startswith("vision.") else "language model"
            return (
                f"{place} holds {len(layers)} of the {depths[match[1]]} layers of its {part}, the first weight missing "
                f"is {name!r}; the checkpoint is incomplete, or config.json is another one's: download it again"
            )
    if not locations:
        return f"{place} holds no weight under a name of LLaVA, such as {name!r}; it is another model than it says"
    return f"{place} lacks the weight {name!r}; the checkpoint is incomplete: download it again"


def _shapes_of_one_layer(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes by name, of the repeated layers the first alone; and how often each kind of layer is repeated."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    depths = {
        "vision.encoder.layers.": config.vision_config.num_hidden_layers,
        "language.model.layers.": config.text_config.num_hidden_layers,
    }
    config = deepcopy(config)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    # On the meta device a module has shapes and no storage.
    with torch.device("meta"):
        parts = {
            "vision": AutoModel.from_config(config.vision_config),
            "projector": LlavaMultiModalProjector(config),
            "language": AutoModelForCausalLM.from_config(config.text_config),
        }
    shapes = {
        f"{part}.{name.removeprefix('vision_model.')}": tuple(weight.shape)
        for part, module in parts.items()
        for name, weight in module.named_parameters()
        if not (part == "vision" and name.removeprefix("vision_model.").startswith(UNUSED))
    }
    if FAMILIES[config.model_type].is_tiled:
        shapes["image_newline"] = (config.text_config.hidden_size,)
    if config.text_config.tie_word_embeddings or config.tie_word_embeddings:
        shapes.pop("language.lm_head.weight", None)
    return shapes, depths


def _expanded(
    shapes: Mapping[str, tuple[int, ...]], depths: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of all layers, one by one: a config may name any number of them."""
    for name, shape in shapes.items():
        match = _LAYER.match(name)
        if match is None:
            yield name, shape
            continue
        rest = name[match.end() :]
        for layer in range(depths[match[1]]):
            yield f"{match[1]}{layer}.{rest}", shape
