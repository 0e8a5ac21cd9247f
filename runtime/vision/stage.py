"""The vision stage: pixels to the embeddings of the kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hivtp_ops.errors import EngineError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from hivtp.engines.base import Engine
    from hivtp.engines.manifest import VisionManifest

T = TypeVar("T", bound=np.generic)


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
        embeds: [num_kept_tokens, hidden] float32, the prefix tokens first, then the patches in raster order.
        patches: the kept patches.
    """

    embeds: NDArray[np.float32]
    patches: KeptPatches


class VisionStage:
    """Runs the vision graph of a bundle.

    Args:
        engine: holds the graph.
        manifest: describes it.
        max_tiles_per_run: more tiles than this, or than the engine takes, go through the graph in several runs,
            which bounds its memory.
    """

    def __init__(self, engine: Engine, manifest: VisionManifest, max_tiles_per_run: int) -> None:
        self.engine = engine
        self.manifest = manifest
        most = engine.max_tiles
        self.max_tiles_per_run = max_tiles_per_run if most is None else min(max_tiles_per_run, most)
        self.is_pruned = "kept_indices" in engine.output_names

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
            EngineError: the engine failed, or the graph's outputs are not those that the manifest describes.
        """
        tiles: list[EncodedTile] = []
        for start in range(0, len(pixel_values), self.max_tiles_per_run):
            chunk = slice(start, start + self.max_tiles_per_run)
            tiles += self._run(pixel_values[chunk], None if patch_mask is None else patch_mask[chunk], start)
        return tiles

    def _run(
        self, pixel_values: NDArray[np.float32], patch_mask: NDArray[np.bool_] | None, first_tile: int
    ) -> list[EncodedTile]:
        if not self.is_pruned:
            outputs = self.engine.run({"pixel_values": pixel_values})
            self._check(outputs, len(pixel_values), None)
            return self._unpruned(outputs["image_embeds"], patch_mask)
        inputs = {"pixel_values": pixel_values} | ({} if patch_mask is None else {"patch_mask": patch_mask})
        outputs = self.engine.run(inputs)
        self._check(outputs, len(pixel_values), patch_mask)
        importance = outputs["importance"]
        if np.isnan(importance).any():
            tile = first_tile + int(np.isnan(importance).any(axis=1).argmax())
            raise ScoreError(
                f"the importance scores of tile {tile} hold NaN: the vision graph overflowed on this image; "
                "export it with --vision-precision fp32, or check the checkpoint's weights"
            )
        prefix = self.manifest.num_prefix_tokens
        return [
            EncodedTile(_own(tile[: prefix + count]), KeptPatches(_own(indices[:count]), _own(scores)))
            for tile, indices, count, scores in zip(
                outputs["image_embeds"],
                outputs["kept_indices"],
                outputs["kept_counts"].tolist(),
                importance,
                strict=True,
            )
        ]

    def _unpruned(self, embeds: NDArray[np.float32], patch_mask: NDArray[np.bool_] | None) -> list[EncodedTile]:
        every_patch = np.arange(self.manifest.num_patches)
        if patch_mask is None:
            return [EncodedTile(_own(tile), KeptPatches(every_patch, None)) for tile in embeds]
        return [
            EncodedTile(tile[is_image], KeptPatches(every_patch[is_image], None))
            for tile, is_image in zip(embeds, patch_mask, strict=True)
        ]

    def _check(self, outputs: Mapping[str, NDArray[Any]], num_tiles: int, patch_mask: NDArray[np.bool_] | None) -> None:
        """Refuse outputs that the manifest does not describe: a bundle may come from a stranger."""
        manifest = self.manifest
        tokens = manifest.num_prefix_tokens + manifest.capacity
        expected: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "image_embeds": (np.float32, (num_tiles, tokens, manifest.hidden_size))
        }
        if self.is_pruned:
            expected |= {
                "kept_indices": (np.integer, (num_tiles, manifest.capacity)),
                "kept_counts": (np.integer, (num_tiles,)),
                "importance": (np.float32, (num_tiles, manifest.num_patches)),
            }
        for name, (kind, shape) in expected.items():
            found = outputs.get(name)
            if found is None or found.shape != shape or not np.issubdtype(found.dtype, kind):
                what = "absent" if found is None else f"{found.dtype} of shape {list(found.shape)}"
                raise EngineError(
                    f"the vision graph's output {name} is {what}, and the manifest says {kind.__name__} of shape "
                    f"{list(shape)}; export the bundle again"
                )
        if self.is_pruned and not self._keeps_patches(outputs["kept_indices"], outputs["kept_counts"], patch_mask):
            raise EngineError(
                f"the vision graph keeps patches that the image does not have, of {manifest.num_patches} in a tile; "
                "export the bundle again"
            )

    def _keeps_patches(self, indices: NDArray[Any], counts: NDArray[Any], patch_mask: NDArray[np.bool_] | None) -> bool:
        """Whether every kept index is one of a patch of the image, each once and in order."""
        capacity, num_patches = self.manifest.capacity, self.manifest.num_patches
        if ((counts < 0) | (counts > capacity)).any():
            return False
        is_kept = np.arange(capacity) < counts[:, None]
        kept = np.where(is_kept, indices, 0)
        if ((kept < 0) | (kept >= num_patches)).any():
            return False
        if not (np.diff(kept) > 0)[is_kept[:, 1:]].all():
            return False
        return patch_mask is None or bool(np.take_along_axis(patch_mask, kept, axis=1)[is_kept].all())


def _own(part: NDArray[T]) -> NDArray[T]:
    """A copy of a part of a run's output, so that a tile that is kept does not hold the memory of its whole run."""
    return part if part.base is None or part.nbytes == part.base.nbytes else part.copy()
