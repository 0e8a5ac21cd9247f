"""The weights of a Hugging Face LLaVA folder, under one name whatever its layout; they stay on disk."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp.runtime.config import read_config, settings_of
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from hivtp.engines.manifest import Manifest

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
# Values of each weight that a fingerprint holds.
NUM_SAMPLES = 16
# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Location:
    """The file of a weight, its name there, and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of one folder; read where they are asked for.

    Attributes:
        folder: where they lie.
        locations: canonical weight name ("vision.…", "projector.…", "language.…", "image_newline") to its
            place on disk.
    """

    folder: Path
    locations: Mapping[str, Location]

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
        """A sha256 that tells checkpoints apart in seconds: by their settings, and by samples of their weights.

        It is the same however the weights are cut into files and named there, in whatever dtype holds their values,
        and however `config.json` is written, also by a later version of transformers. A change of a few values of a
        large weight may go unnoticed.

        Raises:
            CheckpointError: the config or a weight cannot be read.
        """
        return self._digest("", read_config(self.folder))

    @cached_property
    def language_fingerprint(self) -> str:
        """The same for the language model alone.

        Raises:
            CheckpointError: the config or a weight cannot be read.
        """
        return self._digest("language.", read_config(self.folder).text_config)

    def _digest(self, prefix: str, config: Any) -> str:
        names = {name for name in self.locations if name.startswith(prefix)}
        if config.get_text_config().tie_word_embeddings:
            # The embedding table takes its place, whether or not it was saved too.
            names.discard("language.lm_head.weight")
        digest = hashlib.sha256(json.dumps(settings_of(config), sort_keys=True).encode())
        samples = self._samples(names)
        for name in sorted(names):
            digest.update(f"{name} {list(self.locations[name].shape)}".encode())
            digest.update(samples[name])
        return digest.hexdigest()

    def _samples(self, names: Iterable[str]) -> dict[str, bytes]:
        """A few values of each weight, spread over it, as float32; of the file only their pages are read."""
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.locations[name].file, []).append(name)
        samples = {}
        for file, held in by_file.items():
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in held:
                        values = shard.get_tensor(self.locations[name].name).flatten()
                        spread = values[:: max(1, len(values) // NUM_SAMPLES)][:NUM_SAMPLES]
                        samples[name] = spread.float().numpy().tobytes()
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CheckpointError(f"{file} cannot be read ({error})") from error
        return samples


def locate_weights(folder: Path) -> dict[str, Location]:
    """Read where the weights of a folder lie, by their canonical names.

    Raises:
        CheckpointError: a safetensors file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    locations: dict[str, Location] = {}
    for file in _shards(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a mapping
                    canonical = canonical_name(name)
                    if canonical is not None:
                        locations[canonical] = Location(file, name, tuple(shard.get_slice(name).get_shape()))
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


def open_source(folder: str | Path, manifest: Manifest) -> CheckpointWeights:
    """The weights of the checkpoint that a bundle was exported from.

    Raises:
        CheckpointError: it is incomplete or damaged, or another one.
    """
    folder, name = Path(folder), manifest.source.name
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {found}; give the folder of the checkpoint {name!r}, from which the bundle was exported"
        )
    weights = CheckpointWeights(folder, locate_weights(folder))
    if weights.fingerprint != manifest.source.fingerprint:
        raise CheckpointError(
            f"{folder} is not the checkpoint of this {manifest.family} bundle, which was exported from {name!r}: the "
            "settings in its config, or the names, shapes or values of its weights differ; give that folder, or export "
            "this one"
        )
    return weights
