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
        BundleError: the image preprocessing is damaged or not supported, or the graph is not the manifest's.
    """
    manifest = bundle.manifest
    stage = VisionStage(engine, manifest.vision, options.max_tiles_per_run)
    if stage.is_pruned != (manifest.pruning is not None):
        found = "prunes" if stage.is_pruned else "does not prune"
        raise BundleError(f"the vision graph of {bundle.folder} {found}, unlike its manifest says; export it again")
    encoder: ImageEncoder
    try:
        if manifest.tiling is None:
            processor = ImageProcessor.from_config(bundle.read_json("image_processor.json"))
            _check_size(processor, manifest.vision.image_size)
            has_exact_count = manifest.pruning is not None and manifest.pruning.keep is not None
            encoder = SingleTileEncoder(processor, stage, has_exact_count=has_exact_count)
        else:
            encoder = _open_tiled(bundle, manifest.tiling, stage, options.max_tiles)
    except (CheckpointError, ValueError) as error:
        raise BundleError(
            f"the image preprocessing of {bundle.folder} is damaged or not supported: {error}; export it again"
        ) from error
    description = f"{manifest.vision.precision} graph in {engine.description}"
    return CachedEncoder(encoder, EmbeddingCache(options.cache_bytes), description)


def _open_tiled(bundle: Bundle, tiling: TilingManifest, stage: VisionStage, max_tiles: int) -> TiledEncoder:
    vision = bundle.manifest.vision
    if vision.num_prefix_tokens:
        raise ValueError("its vision graph gives prefix tokens, which tiles have not")
    tiler = Tiler.from_config(bundle.read_json("image_processor.json"), max_tiles=max_tiles)
    _check_size(tiler.image_processor, vision.image_size)
    if tiler.pinpoints != tiling.pinpoints:
        raise ValueError(f"its pinpoints are {tiler.pinpoints}, the manifest's {tiling.pinpoints}")
    newline = map_array(bundle.folder / tiling.newline_file, (vision.hidden_size,))
    return TiledEncoder(tiler, stage, bundle.manifest.pruning, tiling, np.array(newline, np.float32))


def _check_size(processor: ImageProcessor, side: int) -> None:
    if processor.output_size != (side, side):
        height, width = processor.output_size
        raise ValueError(f"it makes images of {height} x {width} pixels, and the vision graph takes {side} x {side}")
