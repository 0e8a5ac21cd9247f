from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines import open_vision_engine
from hivtp.engines.base import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.vision import create_image_encoder
from hivtp.runtime.vision.options import VisionOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from hivtp.runtime.vision.cache import CachedEncoder


@pytest.fixture(scope="session")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT with the grids 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 of tiles of 64 pixels."""
    folder = tmp_path_factory.mktemp("next") / "checkpoint"
    return make_checkpoint(folder, family="llava_next", text={"max_position_embeddings": 2048})


@pytest.fixture(scope="session")
def make_next_bundle(next_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports LLaVA-NeXT, without a decoder, with these settings."""

    def make(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("next") / "bundle"
        settings = {"language_precision": "none", **settings}
        return export_bundle(next_checkpoint, folder, ExportSettings(**settings), is_quiet=True).folder

    return make


@pytest.fixture(scope="session")
def next_bundle(make_next_bundle: Callable[..., Path]) -> Path:
    """60 tokens for each image, over all its tiles."""
    return make_next_bundle(keep_total=60)


@pytest.fixture(scope="session")
def open_encoder() -> Callable[..., CachedEncoder]:
    """Opens the image encoder of a bundle."""

    def open_encoder(folder: Path, **options: Any) -> CachedEncoder:
        bundle = Bundle.open(folder)
        engine = open_vision_engine(bundle, "onnxruntime", EngineSettings(1))
        return create_image_encoder(bundle, engine, VisionOptions(**options))

    return open_encoder
