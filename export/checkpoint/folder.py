"""A LLaVA folder, in the layout of transformers or of the original code, opened part by part."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import CONFIG_FILE, FAMILIES, SUPPORTED, read_config, read_object
from hivtp.export.checkpoint.foreign import file_names, refuse_formats, refuse_kind, refuse_weights
from hivtp.export.checkpoint.original_layout.layout import OriginalOptions, complete
from hivtp.export.checkpoint.original_layout.tower import TowerFolder
from hivtp.export.checkpoint.shapes import check_shapes
from hivtp.export.checkpoint.source import CheckpointSource, find_checkpoint
from hivtp.runtime.checkpoint.original_layout import is_original
from hivtp.runtime.checkpoint.weight_files import by_canonical_name, read_headers
from hivtp.runtime.checkpoint.weights import CheckpointWeights
from hivtp_ops.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Checkpoint(CheckpointWeights):
    """A complete, supported LLaVA checkpoint; the weights stay on disk until they are asked for.

    Attributes:
        source: how it is called, and where it comes from.
        config: of its class in transformers.
        processor: of transformers, made for a checkpoint in the layout of the original code; None where the folder has
            one.
    """

    source: CheckpointSource
    config: Any
    processor: Any = None

    @classmethod
    def open(
        cls,
        name: str | Path,
        revision: str | None = None,
        *,
        original: OriginalOptions | None = None,
        is_quiet: bool = False,
    ) -> Checkpoint:
        """Open a checkpoint after checking that it is complete: the config, each shard, each weight and its shape.

        Args:
            name: its folder, or its id on the hub, from where it is downloaded.
            revision: a branch, tag or commit on the hub.
            original: what a checkpoint in the layout of the original code does not say.
            is_quiet: show no progress bars of a download.

        Raises:
            CheckpointError: what was found, and what is supported.
            HubError: it cannot be downloaded.
            MissingExtraError: a package of the export extra is not installed.
        """
        for package in ("torch", "transformers", "safetensors", "onnx", "onnx_ir"):
            _require(package)
        options = original or OriginalOptions()
        tower = None if options.vision_tower is None else TowerFolder.open(options.vision_tower)
        vision_config = None if tower is None else tower.config
        source = find_checkpoint(name, revision, vision_config, is_quiet=is_quiet)
        folder = source.folder
        names = file_names(folder)
        refuse_kind(folder, names)
        if "config.json" not in names:
            raise CheckpointError(f"{folder} has no config.json; give the folder of a {SUPPORTED} checkpoint")
        raw = read_object(folder / CONFIG_FILE)
        has_original_layout = is_original(raw)
        if not has_original_layout:
            options.refuse(folder)
        config = read_config(folder, vision_config)
        refuse_formats(folder, names, is_original=has_original_layout)
        headers = read_headers(folder)
        refuse_weights(folder, headers, is_original=has_original_layout)
        locations, processor = by_canonical_name(headers), None
        if has_original_layout:
            locations, processor = complete(folder, raw, config, locations, tower, options)
        check_shapes(folder, config, locations)
        return cls(folder, locations, source, config, processor)

    @property
    def family(self) -> str:
        """The architecture: "llava", "llava_next" or "llava_onevision"."""
        family: str = self.config.model_type
        return family

    @property
    def is_tiled(self) -> bool:
        """Whether an image becomes a base tile and a grid of tiles."""
        return FAMILIES[self.family].is_tiled


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "export")
