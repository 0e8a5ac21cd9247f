"""A Hugging Face LLaVA-1.5 or LLaVA-NeXT folder, opened part by part."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivtp.export.checkpoint.config import SUPPORTED, read_config
from hivtp.export.checkpoint.foreign import file_names, refuse_formats, refuse_kind, refuse_weights
from hivtp.export.checkpoint.shapes import check_shapes
from hivtp.runtime.weight_files import by_canonical_name, read_headers
from hivtp.runtime.weights import CheckpointWeights
from hivtp_ops.errors import CheckpointError, MissingExtraError


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
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a {SUPPORTED} checkpoint")
        names = file_names(folder)
        refuse_kind(folder, names)
        if "config.json" not in names:
            raise CheckpointError(f"{folder} has no config.json; give the folder of a {SUPPORTED} checkpoint")
        config = read_config(folder)
        refuse_formats(folder, names)
        headers = read_headers(folder)
        refuse_weights(folder, headers)
        locations = by_canonical_name(headers)
        check_shapes(folder, config, locations)
        return cls(folder, locations, config)

    @property
    def family(self) -> str:
        """The architecture: "llava" or "llava_next"."""
        family: str = self.config.model_type
        return family


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "export")
