from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.prepared_image import prepare_images

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.runtime.vision.encoder import EncodedImage

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")


@pytest.fixture(scope="module", params=["unpruned", "pruned", "unpruned next", "pruned next"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    name: str = request.param
    if not name.endswith("next"):
        return Pipeline.load(request.getfixturevalue(f"{name}_bundle"), num_threads=1)
    folder = tmp_path_factory.mktemp("next")
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", text={"max_position_embeddings": 2048})
    settings = ExportSettings(is_pruned=name == "pruned next", preset="192")
    return Pipeline.load(export_bundle(checkpoint, folder / "bundle", settings, is_quiet=True).folder, num_threads=1)


@pytest.fixture
def encoded(pipeline: Pipeline, photos: Path) -> list[EncodedImage]:
    return pipeline.images.encode(prepare_images(pipeline.images, [photos / name for name in PHOTOS]))


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_a_picture_holds_no_memory_of_the_others_of_its_run(encoded: list[EncodedImage]) -> None:
    """Else the bound of the cache would bound nothing."""
    for image in encoded:
        assert all(owner(array).nbytes <= array.nbytes for array in image.arrays)
        assert image.num_bytes == sum(array.nbytes for array in image.arrays)


def test_embeddings_are_held_once(encoded: list[EncodedImage]) -> None:
    num_patches = sum(len(tile.kept_indices) for image in encoded for tile in image.tiles)
    num_rows = sum(len(array) for image in encoded for array in image.arrays if array.ndim == 2)
    assert num_patches <= num_rows == sum(len(image.embeds) for image in encoded) < 2 * num_patches


def test_what_the_cache_holds_cannot_be_changed_from_outside(
    pipeline: Pipeline, encoded: list[EncodedImage], photos: Path
) -> None:
    for array in (array for image in encoded for array in image.arrays):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    again = pipeline.images.encode(prepare_images(pipeline.images, [photos / PHOTOS[1]]))
    assert again[0] is encoded[1]
