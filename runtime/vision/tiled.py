"""LLaVA-NeXT and LLaVA-OneVision: an image is a base tile and a grid of tiles, packed with newline tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.vision.encoder import EncodedImage, TileFrame, TokenCount, View
from hivtp.runtime.vision.interpolation import view_size
from hivtp.runtime.vision.packing import newline_rule, pack_tiles, tile_budgets, trim_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.engines.manifest import TilingManifest
    from hivtp.runtime.inputs.prepared_image import PreparedImage
    from hivtp.runtime.inputs.tile_layout import TileLayout
    from hivtp.runtime.inputs.tiling import Tiler
    from hivtp.runtime.vision.stage import EncodedTile, VisionStage
    from hivtp_ops import PruningSpec


class TiledEncoder:
    """See ImageEncoder.

    Args:
        tiler: images to tiles.
        vision: tiles to the embeddings of their kept tokens.
        spec: what the vision graph prunes by; None where it does not.
        manifest: newline rule and budget.
        newline: [hidden] float32, the newline token's embedding.
    """

    def __init__(
        self,
        tiler: Tiler,
        vision: VisionStage,
        spec: PruningSpec | None,
        manifest: TilingManifest,
        newline: NDArray[np.float32],
    ) -> None:
        self._tiler = tiler
        self._vision = vision
        self._spec = spec
        self._manifest = manifest
        self._newline = newline
        self._newline_rule = newline_rule(manifest.newline)
        self._grid = vision.manifest.grid

    def prepare(self, image: Image.Image, num_images: int = 1) -> PreparedImage:
        """See ImageEncoder.prepare."""
        return self._tiler(image, num_images)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        if not images:
            return []
        layouts = []
        for image in images:
            assert image.layout is not None, "the tiler lays every image out"
            layouts.append(image.layout)
        masks = [layout.patch_mask(self._grid) for layout in layouts]
        tiles = self._vision.encode(np.concatenate([image.pixel_values for image in images]), np.concatenate(masks))
        encoded, start = [], 0
        for layout, image in zip(layouts, images, strict=True):
            encoded.append(self._pack(layout, tiles[start : start + layout.num_tiles], image.digest))
            start += layout.num_tiles
        return encoded

    def frames(self, image: Image.Image, num_images: int = 1) -> list[TileFrame]:
        """See ImageEncoder.frames."""
        layout = self._tiler.layout((image.height, image.width), num_images)
        if layout.num_tiles == 1:
            return [TileFrame(self._tiler.alone.frame(image))]
        base, grid = self._tiler.frames(image)
        return [TileFrame(base), TileFrame(grid, layout.tile_rows, layout.tile_cols)]

    def views(self, image_size: tuple[int, int], num_images: int = 1) -> list[View]:
        """See ImageEncoder.views."""
        layout = self._tiler.layout(image_size, num_images)
        if layout.num_tiles == 1:
            return [View(1, 1, self._tiler.alone.region(image_size))]
        height, width = image_size
        return [
            View(1, 1, (0.0, 0.0, float(width), float(height))),
            View(layout.tile_rows, layout.tile_cols, self._tiler.region(image_size)),
        ]

    def count_tokens(self, image_size: tuple[int, int], num_images: int = 1) -> TokenCount:
        """See ImageEncoder.count_tokens."""
        layout = self._tiler.layout(image_size, num_images)
        if self._spec is None:
            return TokenCount(self._num_unpruned_tokens(layout), is_exact=True)
        total = self._manifest.keep_total
        base, *others = np.minimum(layout.patch_mask(self._grid).sum(axis=1), self._vision.manifest.capacity).tolist()
        num_rows, num_cols = self._view_size(layout)
        is_interpolated = (num_rows, num_cols) != view_size(layout, self._grid, None)
        # A cell is left where half of what it is made of was kept.
        num_kept = base + (min(2 * sum(others), num_rows * num_cols) if is_interpolated else sum(others))
        if total is not None:
            num_kept = min(num_kept, total)
        num_newlines = 0 if self._newline_rule == "none" else num_rows or 1
        has_exact_count = (self._spec.keep is not None or total is not None) and not is_interpolated
        is_exact = has_exact_count and (self._newline_rule != "kept-rows" or layout.num_tiles == 1)
        return TokenCount(num_kept + num_newlines, is_exact=is_exact)

    def _pack(self, layout: TileLayout, tiles: list[EncodedTile], digest: bytes) -> EncodedImage:
        size = self._view_size(layout)
        total = None if self._spec is None else self._manifest.keep_total
        if total is not None and self._spec is not None:
            budgets = self._budgets(layout, tiles, total, size)
            tiles = [
                trim_tile(tile, int(keep), self._grid, self._spec) for tile, keep in zip(tiles, budgets, strict=True)
            ]
        # The unpruned model ends every row, whatever the rule for pruned ones.
        rule = "all" if self._spec is None else self._newline_rule
        embeds = pack_tiles(layout, self._grid, tiles, self._newline, rule, size, total)
        patches = tuple(tile.patches for tile in tiles)
        return EncodedImage(embeds, patches, self._num_unpruned_tokens(layout), digest)

    def _budgets(
        self, layout: TileLayout, tiles: list[EncodedTile], total: int, size: tuple[int, int]
    ) -> NDArray[np.int64]:
        """How many patches each tile keeps; of an interpolated view, as many as make the cells of its budget."""
        scores = np.stack([tile.patches.importance for tile in tiles if tile.patches.importance is not None])
        capacity = self._vision.manifest.capacity
        budgets = tile_budgets(scores, total, self._manifest.min_for_base, capacity)
        rows, cols = view_size(layout, self._grid, None)
        if size != (rows, cols):
            num_patches = (total - int(budgets[0])) * rows * cols // (size[0] * size[1])
            budgets[1:] = tile_budgets(scores[1:], num_patches, 0, capacity)
        return budgets

    def _num_unpruned_tokens(self, layout: TileLayout) -> int:
        num_rows, num_cols = self._view_size(layout)
        # After an image that is not cut stands one newline.
        num_in_view = 1 if layout.num_tiles == 1 else num_rows * (num_cols + 1)
        return self._grid[0] * self._grid[1] + num_in_view

    def _view_size(self, layout: TileLayout) -> tuple[int, int]:
        return view_size(layout, self._grid, self._manifest.max_view_tiles)
