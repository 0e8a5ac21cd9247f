from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


@pytest.fixture(scope="session")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three photographs; LLaVA-NeXT makes 5 tiles of each but the last, and 4 of that."""
    wide = tmp_path_factory.mktemp("images") / "wide.png"
    with Image.open(photos / "coffee.png") as coffee:
        coffee.crop((0, 100, 600, 300)).save(wide)
    return [str(photos / "astronaut.png"), str(photos / "rocket.jpg"), str(wide)]


@pytest.fixture(scope="session")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint", "tiny", family="llava_next")


@pytest.fixture(scope="session")
def make_next_bundle(next_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports the tiny LLaVA-NeXT checkpoint with these settings, without a decoder."""

    def make(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("exported") / "bundle"
        chosen = ExportSettings(language_precision="none", **settings)
        return export_bundle(next_checkpoint, folder, chosen, is_quiet=True).folder

    return make


@pytest.fixture(scope="session")
def next_bundle(make_next_bundle: Callable[..., Path]) -> Path:
    return make_next_bundle(preset="paper")


@pytest.fixture(scope="session")
def int8_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(preset="paper", vision_precision="int8", language_precision="none")


@pytest.fixture(scope="session")
def next_int8_bundle(make_next_bundle: Callable[..., Path]) -> Path:
    return make_next_bundle(preset="paper", vision_precision="int8")


@pytest.fixture(scope="session", params=["llava", "llava_next"])
def either_bundle(request: pytest.FixtureRequest) -> Path:
    """Of each family one."""
    return request.getfixturevalue({"llava": "bare_bundle", "llava_next": "next_bundle"}[request.param])
