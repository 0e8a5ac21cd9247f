"""The vision stage: pixels to the embeddings of the kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp_ops.errors import ScoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp.engines.base import Engine
    from hivtp.engines.bundle import VisionManifest


@dataclass(frozen=True)
class EncodedTile:
    """What the language model sees of one tile.

    Attributes:
        embeds: [num_kept_tokens, hidden] float32, the prefix tokens first, then the patches in raster order.
        kept_indices: [num_kept_patches] int64 raster indices.
        importance: [patches] float32; None where nothing is pruned.
    """

    embeds: NDArray[np.float32]
    kept_indices: NDArray[np.int64]
    importance: NDArray[np.float32] | None


class VisionStage:
    """Runs the vision graph of a bundle.

    Args:
        engine: holds the graph.
        manifest: describes it.
    """

    def __init__(self, engine: Engine, manifest: VisionManifest) -> None:
        self.engine = engine
        self.manifest = manifest
        self.is_pruned = "kept_indices" in engine.output_names

    def encode(self, pixel_values: NDArray[np.float32]) -> list[EncodedTile]:
        """Encode tiles in one run.

        Args:
            pixel_values: [tiles, 3, image_size, image_size] float32, normalised.

        Returns:
            One EncodedTile per tile; each is what the tile gives alone.

        Raises:
            ScoreError: the scores hold NaN, so no patch can be ranked.
            EngineError: the engine failed.
        """
        outputs = self.engine.run({"pixel_values": pixel_values})
        embeds = outputs["image_embeds"]
        if not self.is_pruned:
            every_patch = np.arange(self.manifest.grid[0] * self.manifest.grid[1])
            return [EncodedTile(tile, every_patch, None) for tile in embeds]
        importance = outputs["importance"]
        if np.isnan(importance).any():
            tile = int(np.isnan(importance).any(axis=1).argmax())
            raise ScoreError(
                f"the importance scores of tile {tile} hold NaN: the vision graph overflowed on this image; "
                "export it with --vision-precision fp32, or check the checkpoint's weights"
            )
        prefix = self.manifest.num_prefix_tokens
        return [
            EncodedTile(tile[: prefix + count], indices[:count], scores)
            for tile, indices, count, scores in zip(
                embeds, outputs["kept_indices"], outputs["kept_counts"].tolist(), importance, strict=True
            )
        ]
