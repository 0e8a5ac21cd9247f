"""The weights of a Hugging Face LLaVA folder, under one name whatever its layout; they stay on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hivtp.runtime.checkpoint.config import read_config, read_raw_config, settings_of
from hivtp.runtime.checkpoint.download import checkpoint_folder
from hivtp.runtime.checkpoint.original_layout import EMBEDDINGS, is_original, lengthened
from hivtp.runtime.checkpoint.weight_files import locate_weights
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from hivtp.engines.manifest import Manifest
    from hivtp.runtime.checkpoint.weight_files import Location

# Values of each weight that a fingerprint holds.
NUM_SAMPLES = 16


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
        location = self.locations[name]
        tensor = _stored(location)
        if not location.num_added_rows:
            return tensor
        import torch

        embeddings = tensor if name == EMBEDDINGS else _stored(self.locations[EMBEDDINGS])
        mean = embeddings.float().mean(dim=0).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(location.num_added_rows, -1)])

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
        # A vision tower may lie in a folder of its own, which those who answer later need not have.
        own = {name for name, location in self.locations.items() if location.file.is_relative_to(self.folder)}
        names = {name for name in own if name.startswith(prefix)}
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
            self.locations[held[0]].check_unchanged()
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in held:
                        values = shard.get_tensor(self.locations[name].name).flatten()
                        spread = values[:: max(1, len(values) // NUM_SAMPLES)][:NUM_SAMPLES]
                        samples[name] = spread.float().numpy().tobytes()
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CheckpointError(f"{file} cannot be read ({error})") from error
        return samples


def _stored(location: Location) -> torch.Tensor:
    """Read a weight as it is stored."""
    from safetensors import SafetensorError, safe_open

    location.check_unchanged()
    try:
        with safe_open(location.file, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(location.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {location.name!r} of {location.file}: {error}") from error
    return tensor


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
    if is_original(read_raw_config(folder)) and manifest.language is not None:
        weights = replace(weights, locations=lengthened(weights.locations, manifest.language.vocab_size))
    if weights.fingerprint != manifest.source.fingerprint:
        raise CheckpointError(
            f"{folder} is not the checkpoint of this {manifest.family} bundle, which was exported from {name!r}: the "
            "settings in its config, or the names, shapes or values of its weights differ; give that folder, or export "
            "this one"
        )
    return weights
