"""config.json: the family, and whether its parts are ones that can be exported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_json
from hivtp.export.checkpoint.families.llava import LLAVA
from hivtp.export.checkpoint.families.llava_next import LLAVA_NEXT
from hivtp.export.checkpoint.families.llava_onevision import LLAVA_ONEVISION
from hivtp.export.checkpoint.foreign import refuse_config
from hivtp.runtime.checkpoint.original_layout import KNOWN_TOWERS, converted, is_original, tower_name
from hivtp.runtime.vision.tower_kinds import TOWER_KINDS
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.export.checkpoint.families.family import Family

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# Of any size that a config names; far beyond any model.
MAX_SIZE = 10**7
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION)}
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
SUPPORTED = (
    f"{', '.join(f'{family.title} (model_type {name!r})' for name, family in FAMILIES.items())}, with a CLIP or "
    "SigLIP vision tower and a Llama, Mistral or Qwen2 language model"
)
# As the builder of the vision graph writes them.
VISION_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_SIZES = {
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "image_size",
        "patch_size",
    ),
    "text_config": (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
    ),
}


def read_config(folder: Path, vision_config: Mapping[str, Any] | None = None) -> Any:
    """Read config.json into its class of transformers, after checking that its model can be exported.

    Args:
        folder: of the checkpoint.
        vision_config: of a vision tower in a folder of its own, for a checkpoint in the layout of the original code.

    Raises:
        CheckpointError: what was found, and what is supported.
    """
    raw = read_object(folder / CONFIG_FILE)
    refuse_config(folder, raw)
    if is_original(raw):
        if vision_config is None and tower_name(raw) not in KNOWN_TOWERS:
            raise CheckpointError(
                f"{folder} has the vision tower {str(raw.get('mm_vision_tower'))[:200]!r} and does not say what that "
                "is; give the folder of the CLIP model that it was made from: --vision-tower FOLDER"
            )
        try:
            raw = converted(raw, vision_config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(f"{folder} holds a model of type {kind!r}; supported is {SUPPORTED}")
    problem = _sizes_problem({part: raw[part] for part in _SIZES if isinstance(raw.get(part), dict)})
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    import transformers

    try:
        config = getattr(transformers, family.config_class).from_dict(raw)
        sizes = {part: vars(getattr(config, part)) for part in _SIZES}
        problem = _sizes_problem(sizes) or _architecture_problem(config, family) or family.config_problem(config)
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not a valid LLaVA config: {_shortened(error)}") from error
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    return config


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is not one.
    """
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise CheckpointError(f"{file} cannot be read as JSON: {reason}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a JSON {type(raw).__name__}, expected an object")
    return raw


def sliding_window(text_config: Any) -> int | None:
    """How many positions a language model looks back; a Llama has no window, whatever its config says."""
    window: int | None = text_config.sliding_window if text_config.model_type == "mistral" else None
    return window


def head_size(text_config: Any) -> int:
    """The width of a head of a language model; configs of some kinds do not name it."""
    size: int = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return size


def _sizes_problem(parts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A size that no model has; transformers takes any integer, and fails later or never ends."""
    for part, values in parts.items():
        for name in _SIZES[part]:
            size = values.get(name)
            # None stands for a default, or belongs to another kind of model, which is refused by its type.
            if size is not None and (type(size) is not int or not 1 <= size <= MAX_SIZE):
                return f"{name} of its {part} is {size!r}; expected 1 to {MAX_SIZE}"
    return None


def _architecture_problem(config: Any, family: Family) -> str | None:
    vision, text = config.vision_config, config.text_config
    for is_refused, found in (
        (vision.model_type not in TOWER_KINDS, f"a vision tower of type {vision.model_type!r}"),
        (text.model_type not in LANGUAGE_MODELS, f"a language model of type {text.model_type!r}"),
        (
            not isinstance(config.vision_feature_layer, int),
            f"several vision feature layers {config.vision_feature_layer}",
        ),
    ):
        if is_refused:
            return f"it has {found}; supported is {SUPPORTED}"
    depth, strategy = vision.num_hidden_layers, config.vision_feature_select_strategy
    has_class_token = TOWER_KINDS[vision.model_type].num_class_tokens > 0
    for is_refused, found in (
        (vision.image_size < vision.patch_size, "an image size smaller than its patch size"),
        (
            not has_class_token and strategy == "default",
            f"vision_feature_select_strategy {strategy!r} and no class token: the first patch would be left out",
        ),
        (
            has_class_token and strategy == "full" and family.is_tiled,
            f"vision_feature_select_strategy {strategy!r} and a class token, which would stand in front of every tile",
        ),
        (vision.hidden_size % vision.num_attention_heads != 0, "a vision width that its heads do not divide"),
        (vision.num_channels != 3, f"a vision tower of {vision.num_channels} colour channels"),
        (text.num_attention_heads % text.num_key_value_heads != 0, "heads that its key-value heads do not divide"),
        (vision.hidden_act not in VISION_ACTIVATIONS, f"a vision tower with {vision.hidden_act!r} activation"),
        (
            config.projector_hidden_act not in VISION_ACTIVATIONS,
            f"a projector with {config.projector_hidden_act!r} activation",
        ),
        (text.hidden_act != "silu", f"a language model with {text.hidden_act!r} activation"),
        (
            not -(depth + 1) <= config.vision_feature_layer <= depth,
            f"vision_feature_layer {config.vision_feature_layer}, which lies outside a tower of {depth} layers",
        ),
    ):
        if is_refused:
            return f"it has {found}"
    return None


def _shortened(error: Exception) -> str:
    text = " ".join(f"{error}".split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
