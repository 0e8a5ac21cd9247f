"""The weights of a Hugging Face LLaVA folder, under one name whatever its layout; they stay on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hivtp.runtime.hub.checkpoint import checkpoint_folder
from hivtp.runtime.weight_files import locate_weights
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from hivtp.engines.bundle import Manifest
    from hivtp.runtime.weight_files import Location


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
        """Read one weight by its canonical name, as it is stored; memory-mapped, so only its pages are read.

        Raises:
            CheckpointError: its file was changed, or cannot be read any more.
        """
        from safetensors import SafetensorError, safe_open

        location = self.locations[name]
        location.check_unchanged()
        try:
            with safe_open(location.file, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(location.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {location.name!r} of {location.file}: {error}") from error
        return tensor

    def check_unchanged(self) -> None:
        """Refuse weights of which a file is another than the one that was opened first.

        Raises:
            CheckpointError: which file.
        """
        for location in {location.file: location for location in self.locations.values()}.values():
            location.check_unchanged()

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
            digest.update(self._sample(name))
        return digest.hexdigest()

    @cached_property
    def language_fingerprint(self) -> str:
        """The same for the language model alone, wherever its weights lie."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["text_config"]
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self.locations):
            if name.startswith("language."):
                digest.update(f"{name} {self.locations[name].shape}".encode())
                digest.update(self._sample(name))
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        return self.tensor(name).flatten()[:16].float().numpy().tobytes()


def open_source(folder: str | Path, manifest: Manifest) -> CheckpointWeights:
    """The weights of the checkpoint that a bundle was exported from: a folder, or an id on the hub.

    Raises:
        CheckpointError: it is incomplete or damaged, or another one.
        HubError: it cannot be downloaded, and what to do.
    """
    name = manifest.source.name
    folder = checkpoint_folder(folder, manifest.source.revision)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {found}; give the folder of the checkpoint {name!r}, from which the bundle was exported"
        )
    weights = CheckpointWeights(folder, locate_weights(folder))
    if weights.fingerprint != manifest.source.fingerprint:
        raise CheckpointError(
            f"{folder} is not the checkpoint of this {manifest.family} bundle, which was exported from {name!r}: its "
            "config, or the names, shapes, files or first values of its weights are others; give that folder, or "
            "export this one"
        )
    return weights
