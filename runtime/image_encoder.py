"""From pictures to the tokens that the language model sees of them, for LLaVA-1.5 and for LLaVA-NeXT."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hivtp.runtime.image_processor import ImageProcessor
from hivtp.runtime.overlay import TileFrame
from hivtp.runtime.packing import newline_rule, pack_tiles, tile_budgets, trim_tile
from hivtp.runtime.prepared_image import PreparedImage, check_family
from hivtp.runtime.tiling import MAX_TILES, Tiler, check_max_tiles
from hivtp_ops.errors import BundleError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.engines.bundle import Bundle, TilingManifest
    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.embedding_cache import EmbeddingCache
    from hivtp.runtime.tiling import TileLayout
    from hivtp.runtime.vision import EncodedTile, KeptPatches, VisionStage
    from hivtp_ops import PruningSpec


@dataclass(frozen=True)
class EncodedImage:
    """What the language model sees of a picture.

    Attributes:
        embeds: [num_tokens, hidden] float32, newline tokens included: an array, or DeviceRows.
        tiles: which patches each tile kept.
        num_unpruned_tokens: tokens that the unpruned model would see.
    """

    embeds: Embeddings
    tiles: tuple[KeptPatches, ...]
    num_unpruned_tokens: int

    @property
    def num_bytes(self) -> int:
        """Memory that it holds; on a device all that its vision run wrote, be it shared with other images."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[Any]:
        """All that it holds: arrays, and embeddings that may be DeviceRows."""
        scores = [tile.importance for tile in self.tiles if tile.importance is not None]
        return [self.embeds, *scores, *(tile.kept_indices for tile in self.tiles)]


class ImageEncoder(Protocol):
    """Prepares pictures and encodes them; each picture is encoded as it would be alone."""

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Cut, resize and normalise a picture as `load_image` gives it."""

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode pictures, all their tiles in as few runs as fit."""

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """The picture as the model sees it, for people: its tiles in order, before normalising."""


class SingleTileEncoder:
    """LLaVA-1.5: a picture is one tile, and its tokens are the tile's.

    Args:
        processor: pictures to pixels.
        vision: pixels to the embeddings of the kept tokens.
    """

    def __init__(self, processor: ImageProcessor, vision: VisionStage) -> None:
        self._processor = processor
        self._vision = vision

    def prepare(self, image: Image.Image) -> PreparedImage:
        """See ImageEncoder.prepare."""
        return PreparedImage(self._processor([image]), None)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        if not images:
            return []
        check_family(images, "LLaVA-1.5", False, self._vision.manifest.image_size)
        tiles = self._vision.encode(np.concatenate([image.pixel_values for image in images]))
        num_tokens = self._vision.manifest.num_image_tokens
        return [EncodedImage(tile.embeds, (tile.kept_patches,), num_tokens) for tile in tiles]

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """See ImageEncoder.frames."""
        return [TileFrame(self._processor.frame(image))]


class TiledEncoder:
    """LLaVA-NeXT: a picture is a base tile and a grid of tiles, packed with newline tokens.

    Args:
        tiler: pictures to tiles.
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

    def prepare(self, image: Image.Image) -> PreparedImage:
        """See ImageEncoder.prepare."""
        tiled = self._tiler(image)
        return PreparedImage(tiled.pixel_values, tiled.layout)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        if not images:
            return []
        check_family(images, "LLaVA-NeXT", True, self._vision.manifest.image_size)
        layouts = [image.layout for image in images if image.layout is not None]
        masks = [layout.patch_mask(self._grid) for layout in layouts]
        tiles = self._vision.encode(np.concatenate([image.pixel_values for image in images]), np.concatenate(masks))
        encoded, start = [], 0
        for layout in layouts:
            encoded.append(self._pack(layout, tiles[start : start + layout.num_tiles]))
            start += layout.num_tiles
        return encoded

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """See ImageEncoder.frames."""
        layout = self._tiler.layout((image.height, image.width))
        base, grid = self._tiler.frames(image)
        return [TileFrame(base), TileFrame(grid, layout.tile_rows, layout.tile_cols)]

    def _pack(self, layout: TileLayout, tiles: list[EncodedTile]) -> EncodedImage:
        total = self._manifest.keep_total
        if total is not None and self._spec is not None:
            scores = np.stack([tile.importance for tile in tiles if tile.importance is not None])
            budgets = tile_budgets(scores, total, self._manifest.least_for_base, self._vision.manifest.capacity)
            tiles = [
                trim_tile(tile, int(keep), self._grid, self._spec) for tile, keep in zip(tiles, budgets, strict=True)
            ]
        # The unpruned model ends every row, whatever the rule for pruned ones.
        rule = "all" if self._spec is None else self._newline_rule
        embeds = pack_tiles(layout, self._grid, tiles, self._newline, rule)
        return EncodedImage(embeds, tuple(tile.kept_patches for tile in tiles), self._num_unpruned_tokens(layout))

    def _num_unpruned_tokens(self, layout: TileLayout) -> int:
        rows, cols = layout.patch_rows(self._grid), layout.patch_cols(self._grid)
        num_rows, num_cols = (len(range(part.start, part.stop)) for part in (rows, cols))
        return self._grid[0] * self._grid[1] + num_rows * (num_cols + 1)


class CachedEncoder:
    """Another encoder, with a cache before it: a picture that was encoded before costs no vision time.

    Args:
        encoder: encodes what the cache does not hold.
        cache: may be shared between threads.
    """

    def __init__(self, encoder: ImageEncoder, cache: EmbeddingCache) -> None:
        self._encoder = encoder
        self._cache = cache

    def prepare(self, image: Image.Image) -> PreparedImage:
        """See ImageEncoder.prepare."""
        return self._encoder.prepare(image)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        keys = [_content_key(image) for image in images]
        found = {key: encoded for key in set(keys) if (encoded := self._cache.get(key)) is not None}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        for key, encoded in zip(missing, self._encoder.encode(list(missing.values())), strict=True):
            found[key] = encoded
            # Later answers come from the same arrays.
            for array in encoded.arrays:
                if isinstance(array, np.ndarray):
                    array.flags.writeable = False
            self._cache.put(key, encoded)
        return [found[key] for key in keys]

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """See ImageEncoder.frames."""
        return self._encoder.frames(image)


def open_image_encoder(
    bundle: Bundle, vision: VisionStage, cache: EmbeddingCache, max_tiles: int = MAX_TILES
) -> ImageEncoder:
    """The encoder that a bundle asks for, with a cache before it.

    Args:
        bundle: what says how pictures are prepared.
        vision: its vision stage.
        cache: of pictures seen before.
        max_tiles: LLaVA-NeXT: a picture that becomes more tiles is refused.

    Raises:
        BundleError: its image preprocessing is damaged or not supported.
        SettingsError: `max_tiles` is not a whole number of 2 or more.
    """
    check_max_tiles(max_tiles)
    manifest = bundle.manifest
    if (manifest.family, manifest.tiling is None) not in {("llava", True), ("llava_next", False)}:
        tiling = "has no tiling" if manifest.tiling is None else "has a tiling"
        raise BundleError(
            f"the manifest of {bundle.folder} is damaged: its family is {manifest.family!r}, and it {tiling}; "
            "copy or export the bundle again"
        )
    try:
        if manifest.tiling is None:
            processor = ImageProcessor.from_config(bundle.read_json("image_processor.json"))
            return CachedEncoder(SingleTileEncoder(processor, vision), cache)
        return CachedEncoder(_open_tiled(bundle, manifest.tiling, vision, max_tiles), cache)
    except (CheckpointError, OSError, ValueError) as error:
        raise BundleError(
            f"the image preprocessing of {bundle.folder} is damaged or not supported: {error}; export it again"
        ) from error


def _open_tiled(bundle: Bundle, tiling: TilingManifest, vision: VisionStage, max_tiles: int) -> TiledEncoder:
    tiler = Tiler.from_config(bundle.read_json("image_processor.json"), max_tiles=max_tiles)
    if tiler.pinpoints != tiling.pinpoints:
        raise ValueError(f"its pinpoints are {tiler.pinpoints}, the manifest's {tiling.pinpoints}")
    newline = np.load(bundle.folder / tiling.newline_file, allow_pickle=False)
    return TiledEncoder(tiler, vision, bundle.manifest.pruning, tiling, newline)


def _content_key(image: PreparedImage) -> bytes:
    """A digest of the pixels and of what else decides the tokens."""
    digest = hashlib.blake2b(np.ascontiguousarray(image.pixel_values).data, digest_size=32)
    digest.update(repr(image.layout).encode())
    return digest.digest()
