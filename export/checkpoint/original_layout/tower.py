"""The vision tower of a checkpoint in the original layout, which may lie in a folder of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_json
from hivtp.runtime.checkpoint.weight_files import read_headers
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.runtime.checkpoint.weight_files import Location

# The names of a CLIP model, of its tower alone, and of the latter as transformers 5 saves it.
_NAME = re.compile(r"^(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)$")
_BUFFER = re.compile(r"position_ids$")


@dataclass(frozen=True)
class TowerFolder:
    """A folder with a vision tower.

    Attributes:
        config: of the tower.
        locations: its weights by their canonical names; empty where the folder has none.
    """

    config: Mapping[str, Any]
    locations: Mapping[str, Location]

    @classmethod
    def open(cls, folder: Path) -> TowerFolder:
        """Open the folder of a CLIP model of transformers.

        Raises:
            CheckpointError: there is no such folder, or it holds another model.
        """
        try:
            raw = read_json(folder / "config.json")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the vision tower {folder} has no config.json that can be read ({error}); give the folder of a CLIP "
                "model of transformers, such as openai/clip-vit-large-patch14-336"
            ) from error
        config = raw.get("vision_config") if isinstance(raw, dict) and raw.get("model_type") == "clip" else raw
        if not isinstance(config, dict) or raw.get("model_type") not in ("clip", "clip_vision_model"):
            raise CheckpointError(f"the vision tower {folder} is not a CLIP model of transformers")
        has_weights = any(
            item.name == "model.safetensors" or item.name.endswith(".index.json") for item in folder.iterdir()
        )
        locations = {}
        for location in read_headers(folder) if has_weights else ():
            match = _NAME.match(location.name)
            if match and not _BUFFER.search(location.name):
                locations[f"vision.{match[1]}"] = location
        return cls({**config, "model_type": "clip_vision_model"}, locations)
