"""A Hugging Face LLaVA-1.5 or LLaVA-NeXT folder, opened part by part."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

SUPPORTED = (
    "LLaVA-1.5 (model_type 'llava') or LLaVA-NeXT ('llava_next') with a CLIP vision tower "
    "and a Llama or Mistral language model"
)
LANGUAGE_MODELS = ("llama", "mistral")

# Weight names, from any layout, to `part.name`: the hub's (transformers 4), those of a live model, and
# those that transformers 5 saves, which drop the tower's `vision_model.`.
_CANONICAL_NAMES = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)$"), r"vision.\1"),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.(.+)$"), r"projector.\1"),
    (re.compile(r"^language_model\.(model\..+|lm_head\..+)$"), r"language.\1"),
    (re.compile(r"^model\.language_model\.(?:model\.)?(.+)$"), r"language.model.\1"),
    (re.compile(r"^(lm_head\..+)$"), r"language.\1"),
    (re.compile(r"^(?:model\.)?(image_newline)$"), r"\1"),
)
# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class _Location:
    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A complete, supported LLaVA checkpoint; the weights stay on disk until they are asked for.

    Attributes:
        folder: where it lies.
        config: its `transformers.LlavaConfig` or `LlavaNextConfig`.
        locations: canonical weight name ("vision.…", "projector.…", "language.…", "image_newline") to its
            place on disk.
    """

    folder: Path
    config: Any
    locations: Mapping[str, _Location]

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
        locations = _locate_weights(folder)
        checkpoint = cls(folder, config, locations)
        checkpoint._check_weights()
        return checkpoint

    @property
    def family(self) -> str:
        """The architecture: "llava" or "llava_next"."""
        family: str = self.config.model_type
        return family

    def tensor(self, name: str) -> torch.Tensor:
        """Read one weight by its canonical name, as it is stored; memory-mapped, so only its pages are read."""
        from safetensors import safe_open

        location = self.locations[name]
        with safe_open(location.file, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(location.name)
        return tensor

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Read the weights under a prefix such as "vision.", named without it."""
        names = [name for name in self.locations if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def language_tensor(self, name: str) -> torch.Tensor:
        """Read a language weight by its name in the causal language model; a tied head is the embedding table."""
        if name == "lm_head.weight" and "language.lm_head.weight" not in self.locations:
            name = "model.embed_tokens.weight"
        return self.tensor(f"language.{name}")

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over the config and every weight's name, file size and place: tells checkpoints apart in no time."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in sorted(self.locations):
            location = self.locations[name]
            digest.update(f"{name} {location.shape} {location.file.name} {location.file.stat().st_size}".encode())
            sample = self.tensor(name).flatten()[:16].float().numpy()
            digest.update(sample.tobytes())
        return digest.hexdigest()

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


def _locate_weights(folder: Path) -> dict[str, _Location]:
    from safetensors import SafetensorError, safe_open

    locations: dict[str, _Location] = {}
    for file in _shards(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a mapping
                    canonical = canonical_name(name)
                    if canonical is not None:
                        locations[canonical] = _Location(file, name, tuple(shard.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from error
    return locations


def _shards(folder: Path) -> list[Path]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            names = sorted(set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index_file} is not a valid shard index: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing)}; download them again"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern)]
    found = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
    raise CheckpointError(f"{folder} holds {found}; supported are safetensors files, which cannot carry code")


def canonical_name(name: str) -> str | None:
    """The canonical name of a weight in any published layout; None for what is not a weight of the model."""
    if _BUFFERS.search(name):
        return None
    for pattern, replacement in _CANONICAL_NAMES:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return None


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
