"""LLaVA-1.5: an image is one tile, and its tokens are the tile's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.inputs.prepared_image import PreparedImage
from hivtp.runtime.vision.encoder import EncodedImage, TileFrame, TokenCount, View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from hivtp.runtime.inputs.image_processor import ImageProcessor
    from hivtp.runtime.vision.stage import VisionStage


class SingleTileEncoder:
    """See ImageEncoder.

    Args:
        processor: images to pixels.
        vision: pixels to the embeddings of the kept tokens.
        has_exact_count: whether pruning keeps the same number of patches of every image.
    """

    def __init__(self, processor: ImageProcessor, vision: VisionStage, *, has_exact_count: bool = False) -> None:
        self._processor = processor
        self._vision = vision
        self._has_exact_count = has_exact_count

    def prepare(self, image: Image.Image, num_images: int = 1) -> PreparedImage:  # noqa: ARG002  every image is one tile
        """See ImageEncoder.prepare."""
        return PreparedImage(self._processor([image]), None)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        if not images:
            return []
        tiles = self._vision.encode(np.concatenate([image.pixel_values for image in images]))
        num_tokens = self._vision.manifest.num_image_tokens
        return [
            EncodedImage(tile.embeds, (tile.patches,), num_tokens, image.digest)
            for tile, image in zip(tiles, images, strict=True)
        ]

    def frames(self, image: Image.Image, num_images: int = 1) -> list[TileFrame]:  # noqa: ARG002  every image is one tile
        """See ImageEncoder.frames."""
        side = self._vision.manifest.seen_size
        return [TileFrame(self._processor.frame(image).crop((0, 0, side, side)))]

    def views(self, image_size: tuple[int, int], num_images: int = 1) -> list[View]:  # noqa: ARG002  every image is one tile
        """See ImageEncoder.views."""
        left, top, right, bottom = self._processor.region(image_size)
        share = self._vision.manifest.seen_size / self._vision.manifest.image_size
        return [View(1, 1, (left, top, left + (right - left) * share, top + (bottom - top) * share))]

    def count_tokens(self, image_size: tuple[int, int], num_images: int = 1) -> TokenCount:  # noqa: ARG002  every image is one tile
        """See ImageEncoder.count_tokens."""
        manifest = self._vision.manifest
        is_exact = not self._vision.is_pruned or self._has_exact_count
        return TokenCount(manifest.num_prefix_tokens + manifest.capacity, is_exact)
