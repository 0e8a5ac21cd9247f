"""A Hugging Face LLaVA-1.5 or LLaVA-NeXT folder, opened part by part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivtp.runtime.weights import CheckpointWeights, locate_weights
from hivtp_ops.errors import CheckpointError, MissingExtraError

SUPPORTED = (
    "LLaVA-1.5 (model_type 'llava') or LLaVA-NeXT ('llava_next') with a CLIP vision tower "
    "and a Llama or Mistral language model"
)
LANGUAGE_MODELS = ("llama", "mistral")


@dataclass(frozen=True)
class Checkpoint(CheckpointWeights):
    """A complete, supported LLaVA checkpoint; the weights stay on disk until they are asked for.

    Attributes:
        config: its `transformers.LlavaConfig` or `LlavaNextConfig`.
    """

    config: Any

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder after checking that it is complete: the config, each shard, each weight and its shape.

        Raises:
            CheckpointError: what was found, and what is supported.
            MissingExtraError: a package of the export extra is not installed.
        """
        for package in ("torch", "transformers", "safetensors", "onnx", "onnx_ir"):
            _require(package)
        folder = Path(folder)
        config = _read_config(folder)
        locations = locate_weights(folder)
        checkpoint = cls(folder, locations, config)
        checkpoint._check_weights()
        return checkpoint

    @property
    def family(self) -> str:
        """The architecture: "llava" or "llava_next"."""
        family: str = self.config.model_type
        return family

    def _check_weights(self) -> None:
        expected = _expected_shapes(self.config)
        missing = [name for name in expected if name not in self.locations]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of {len(expected)} weights, the first is {missing[0]!r}; "
                "the checkpoint is incomplete: download it again"
            )
        for name, shape in expected.items():
            found = self.locations[name].shape
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}: {name!r} has shape {list(found)}, the config asks for {list(shape)}; "
                    "config.json and the weights do not belong together"
                )


def _require(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "export")


def _read_config(folder: Path) -> Any:
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a {SUPPORTED} checkpoint")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a {SUPPORTED} checkpoint")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found not in ("llava", "llava_next"):
        raise CheckpointError(f"{folder} holds a model of type {found!r}; supported is {SUPPORTED}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(
            f"{folder} is quantised ({method}); export the original checkpoint, "
            "and choose precisions with --vision-precision and --language-precision"
        )

    from transformers import LlavaConfig, LlavaNextConfig

    try:
        config = (LlavaConfig if found == "llava" else LlavaNextConfig).from_dict(raw)
    except Exception as error:
        raise CheckpointError(f"{file} is not a valid LLaVA config: {error}") from error
    _check_architecture(folder, config)
    return config


def _check_architecture(folder: Path, config: Any) -> None:
    vision, text = config.vision_config, config.text_config
    strategies = ("default", "full") if config.model_type == "llava" else ("default",)
    refusals = [
        (vision.model_type != "clip_vision_model", f"a vision tower of type {vision.model_type!r}"),
        (text.model_type not in LANGUAGE_MODELS, f"a language model of type {text.model_type!r}"),
        (
            not isinstance(config.vision_feature_layer, int),
            f"several vision feature layers {config.vision_feature_layer}",
        ),
        (
            config.vision_feature_select_strategy not in strategies,
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}",
        ),
        (vision.image_size % vision.patch_size != 0, "an image size that its patch size does not divide"),
        (
            text.model_type in LANGUAGE_MODELS and text.hidden_act != "silu",
            f"a language model with {getattr(text, 'hidden_act', None)!r} activation",
        ),
    ]
    for is_refused, found in refusals:
        if is_refused:
            raise CheckpointError(f"{folder} has {found}; supported is {SUPPORTED}")
    depth = vision.num_hidden_layers
    if not -(depth + 1) <= config.vision_feature_layer <= depth:
        raise CheckpointError(
            f"{folder}: vision_feature_layer {config.vision_feature_layer} lies outside a tower of {depth} layers"
        )


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM, CLIPVisionModel
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    # On the meta device a module has shapes and no storage.
    with torch.device("meta"):
        parts = {
            "vision": CLIPVisionModel(config.vision_config),
            "projector": LlavaMultiModalProjector(config),
            "language": AutoModelForCausalLM.from_config(config.text_config),
        }
    shapes = {
        f"{part}.{name.removeprefix('vision_model.')}": tuple(weight.shape)
        for part, module in parts.items()
        for name, weight in module.named_parameters()
    }
    # The tower's last norm serves only its pooled output, which LLaVA does not use.
    for name in [name for name in shapes if name.startswith("vision.post_layernorm")]:
        del shapes[name]
    if config.model_type == "llava_next":
        shapes["image_newline"] = (config.text_config.hidden_size,)
    if config.text_config.tie_word_embeddings or config.tie_word_embeddings:
        shapes.pop("language.lm_head.weight", None)
    return shapes
