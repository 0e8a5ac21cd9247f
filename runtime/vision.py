"""The vision stage: pixels to the embeddings of the kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import open_vision_engine
from hivtp.engines.base import DeviceEngine
from hivtp.runtime.device_rows import DeviceRows
from hivtp_ops.errors import ScoreError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from hivtp.engines import Engine, EngineSettings
    from hivtp.engines.base import Arrays, Device
    from hivtp.engines.bundle import Bundle, VisionManifest
    from hivtp.runtime.device_rows import Embeddings


# A tile of ViT-L takes about 0.15 GiB of activations in float32.
DEFAULT_MAX_TILES_PER_RUN = 8


@dataclass(frozen=True)
class KeptPatches:
    """Which patches of one tile were kept, and why.

    Attributes:
        kept_indices: [num_kept_patches] int64 raster indices.
        importance: [patches] float32; None where nothing is pruned.
    """

    kept_indices: NDArray[np.int64]
    importance: NDArray[np.float32] | None


@dataclass(frozen=True)
class EncodedTile:
    """What the language model sees of one tile.

    Attributes:
        embeds: [num_kept_tokens, hidden] float32, the prefix tokens first, then the patches in raster order: an array,
            or DeviceRows.
        kept_indices, importance: see KeptPatches.
    """

    embeds: Embeddings
    kept_indices: NDArray[np.int64]
    importance: NDArray[np.float32] | None

    @property
    def kept_patches(self) -> KeptPatches:
        """The tile without its embeddings."""
        return KeptPatches(self.kept_indices, self.importance)


class VisionStage:
    """Runs the vision graph of a bundle.

    Args:
        engine: holds the graph.
        manifest: describes it.
        max_tiles_per_run: more tiles than this, or than the engine takes, go through the graph in several runs,
            which bounds its memory; an int8 graph always runs one by one.
        rows_device: leave the embeddings in the memory of this device, as DeviceRows, if the engine runs there.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: VisionManifest,
        max_tiles_per_run: int = DEFAULT_MAX_TILES_PER_RUN,
        rows_device: Device | None = None,
    ) -> None:
        if isinstance(max_tiles_per_run, bool) or not isinstance(max_tiles_per_run, int) or max_tiles_per_run < 1:
            raise SettingsError(f"max_tiles_per_run must be a whole number, 1 or more, not {max_tiles_per_run!r}")
        self.engine = engine
        self.manifest = manifest
        # An int8 graph takes one scale for the activations of a whole run, so tiles in it would change each other.
        most = 1 if manifest.precision == "int8" else max_tiles_per_run
        self.max_tiles_per_run = most if engine.max_tiles is None else min(most, engine.max_tiles)
        self.is_pruned = "kept_indices" in engine.output_names
        self._rows_engine: DeviceEngine | None = None
        if isinstance(engine, DeviceEngine) and rows_device is not None and engine.view_device == rows_device:
            self._rows_engine = engine

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        settings: EngineSettings,
        max_tiles_per_run: int = DEFAULT_MAX_TILES_PER_RUN,
        engine: str = "auto",
    ) -> VisionStage:
        """Open the vision graph of a bundle in an engine; see open_vision_engine for their names.

        Raises:
            EngineError: the graph cannot be loaded.
            MissingExtraError: the engine's package is not installed.
        """
        return cls(open_vision_engine(bundle, engine, settings), bundle.manifest.vision, max_tiles_per_run)

    def leaving_rows_on(self, device: Device | None) -> VisionStage:
        """The same stage with another `rows_device`."""
        return VisionStage(self.engine, self.manifest, self.max_tiles_per_run, device)

    def encode(
        self, pixel_values: NDArray[np.float32], patch_mask: NDArray[np.bool_] | None = None
    ) -> list[EncodedTile]:
        """Encode tiles.

        Args:
            pixel_values: [tiles, 3, image_size, image_size] float32, normalised.
            patch_mask: [tiles, patches] bool, False for padding, which is never kept; for LLaVA-NeXT.

        Returns:
            One EncodedTile per tile; each is what the tile gives alone. Its arrays hold no memory of the others.

        Raises:
            ScoreError: the scores hold NaN, so no patch can be ranked.
            EngineError: the engine failed.
        """
        tiles: list[EncodedTile] = []
        for start in range(0, len(pixel_values), self.max_tiles_per_run):
            chunk = slice(start, start + self.max_tiles_per_run)
            tiles += self._run(pixel_values[chunk], None if patch_mask is None else patch_mask[chunk], start)
        return tiles

    def _run(
        self, pixel_values: NDArray[np.float32], patch_mask: NDArray[np.bool_] | None, first_tile: int
    ) -> list[EncodedTile]:
        prefix = self.manifest.num_prefix_tokens
        if not self.is_pruned:
            embeds = self._outputs({"pixel_values": pixel_values})["image_embeds"]
            every_patch = np.arange(self.manifest.grid[0] * self.manifest.grid[1])
            if patch_mask is None:
                return [EncodedTile(_own(tile), every_patch, None) for tile in embeds]
            return [
                EncodedTile(tile[is_picture], every_patch[is_picture], None)
                for tile, is_picture in zip(embeds, patch_mask, strict=True)
            ]
        inputs = {"pixel_values": pixel_values} | ({} if patch_mask is None else {"patch_mask": patch_mask})
        outputs = self._outputs(inputs)
        importance = outputs["importance"]
        if np.isnan(importance).any():
            tile = first_tile + int(np.isnan(importance).any(axis=1).argmax())
            raise ScoreError(
                f"the importance scores of tile {tile} hold NaN: the vision graph overflowed on this image; "
                "export it with --vision-precision fp32, or check the checkpoint's weights"
            )
        return [
            EncodedTile(_own(tile[: prefix + count]), _own(indices[:count]), _own(scores))
            for tile, indices, count, scores in zip(
                outputs["image_embeds"],
                outputs["kept_indices"],
                outputs["kept_counts"].tolist(),
                importance,
                strict=True,
            )
        ]

    def _outputs(self, inputs: Arrays) -> Mapping[str, Any]:
        """The outputs of a run; `image_embeds` has one item for each tile."""
        if self._rows_engine is None:
            return self.engine.run(inputs)
        embeds, outputs = self._rows_engine.run_keeping(inputs, "image_embeds")
        num_tiles, num_rows, _ = embeds.shape
        rows = [DeviceRows.of_source(embeds, num_rows, tile * num_rows) for tile in range(num_tiles)]
        return {**outputs, "image_embeds": rows}


def _own(part: Any) -> Any:
    """A copy of a part of a run's output, so that a tile that is kept does not hold the memory of its whole run.

    DeviceRows hold it, and say so.
    """
    if isinstance(part, DeviceRows):
        return part
    return part if part.base is None or part.nbytes == part.base.nbytes else part.copy()
