"""The vision stage: images to the embeddings of their kept tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines.files import map_array
from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.tiling import Tiler
from hivtp.runtime.vision.cache import CachedEncoder, EmbeddingCache
from hivtp.runtime.vision.options import VisionOptions
from hivtp.runtime.vision.single_tile import SingleTileEncoder
from hivtp.runtime.vision.stage import VisionStage
from hivtp.runtime.vision.tiled import TiledEncoder
from hivtp_ops.errors import BundleError, CheckpointError

if TYPE_CHECKING:
    from hivtp.engines.base import Engine
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.manifest import TilingManifest
    from hivtp.runtime.vision.encoder import ImageEncoder

__all__ = ["VisionOptions", "create_image_encoder"]


def create_image_encoder(bundle: Bundle, engine: Engine, options: VisionOptions) -> CachedEncoder:
    """The encoder that a bundle's family asks for, with a cache before it.

    Args:
        bundle: says how images are prepared.
        engine: holds its vision graph.
        options: bounds of tiles and of the cache.

    Raises:
        BundleError: the image preprocessing is damaged or not supported.
    """
    manifest = bundle.manifest
    stage = VisionStage(engine, manifest.vision, options.max_tiles_per_run)
    encoder: ImageEncoder
    try:
        if manifest.tiling is None:
            processor = ImageProcessor.from_config(bundle.read_json("image_processor.json"))
            _check_size(processor.output_size, manifest.vision.image_size)
            has_exact_count = manifest.pruning is not None and manifest.pruning.keep is not None
            encoder = SingleTileEncoder(processor, stage, has_exact_count=has_exact_count)
        else:
            encoder = _open_tiled(bundle, manifest.tiling, stage, options.max_tiles)
    except (CheckpointError, OSError, ValueError) as error:
        raise BundleError(
            f"the image preprocessing of {bundle.folder} is damaged or not supported: {error}; export it again"
        ) from error
    return CachedEncoder(encoder, EmbeddingCache(options.cache_bytes))


def _open_tiled(bundle: Bundle, tiling: TilingManifest, stage: VisionStage, max_tiles: int) -> TiledEncoder:
    tiler = Tiler.from_config(bundle.read_json("image_processor.json"), max_tiles=max_tiles)
    _check_size((tiler.tile_size, tiler.tile_size), bundle.manifest.vision.image_size)
    if tiler.pinpoints != tiling.pinpoints:
        raise ValueError("its pinpoints are not the manifest's")
    newline = map_array(bundle.folder / tiling.newline_file, (bundle.manifest.vision.hidden_size,))
    return TiledEncoder(tiler, stage, bundle.manifest.pruning, tiling, np.array(newline, np.float32))


def _check_size(found: tuple[int, int], expected: int) -> None:
    if found != (expected, expected):
        raise ValueError(
            f"it makes tiles of {found[0]} x {found[1]} pixels, and the graph takes {expected} x {expected}"
        )
