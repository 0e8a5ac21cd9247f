"""What holds of the encoder of every family, pruned or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.runtime.inputs.images import load_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.runtime.vision.cache import CachedEncoder
    from hivtp.runtime.vision.encoder import EncodedImage

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")


@pytest.fixture(scope="module", params=["unpruned", "pruned", "unpruned next", "pruned next"])
def encoder(
    request: pytest.FixtureRequest, open_encoder: Callable[..., CachedEncoder], make_next_bundle: Callable[..., Path]
) -> CachedEncoder:
    name: str = request.param
    if name.endswith("next"):
        return open_encoder(make_next_bundle(is_pruned=name == "pruned next", preset="192"))
    return open_encoder(request.getfixturevalue(f"{name}_bundle"))


@pytest.fixture
def encoded(encoder: CachedEncoder, photos: Path) -> list[EncodedImage]:
    return encoder.encode([encoder.prepare(load_image(photos / name)) for name in PHOTOS])


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_an_image_is_encoded_as_it_is_alone(encoder: CachedEncoder, encoded: list[EncodedImage], photos: Path) -> None:
    for name, image in zip(PHOTOS, encoded, strict=True):
        encoder.cache.clear()
        [alone] = encoder.encode([encoder.prepare(load_image(photos / name))])
        assert alone.digest == image.digest
        assert alone.num_unpruned_tokens == image.num_unpruned_tokens
        np.testing.assert_allclose(alone.embeds, image.embeds, atol=1e-5)
        for tile, expected in zip(alone.tiles, image.tiles, strict=True):
            np.testing.assert_array_equal(tile.kept_indices, expected.kept_indices)


def test_no_images_are_no_work(encoder: CachedEncoder) -> None:
    assert encoder.encode([]) == []


def test_an_image_holds_no_memory_of_the_others_of_its_run(encoded: list[EncodedImage]) -> None:
    """Else the bound of the cache would bound nothing."""
    for image in encoded:
        assert all(owner(array).nbytes <= array.nbytes for array in image.arrays)
        assert image.num_bytes == sum(array.nbytes for array in image.arrays)


def test_embeddings_are_held_once(encoded: list[EncodedImage]) -> None:
    num_patches = sum(len(tile.kept_indices) for image in encoded for tile in image.tiles)
    num_tokens = sum(len(array) for image in encoded for array in image.arrays if array.ndim == 2)
    assert num_patches <= num_tokens == sum(len(image.embeds) for image in encoded) < 2 * num_patches


def test_what_the_cache_holds_cannot_be_changed_from_outside(
    encoder: CachedEncoder, encoded: list[EncodedImage], photos: Path
) -> None:
    for array in (array for image in encoded for array in image.arrays):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    again = encoder.encode([encoder.prepare(load_image(photos / PHOTOS[1]))])
    assert again[0] is encoded[1]


def test_the_frames_show_every_tile(encoder: CachedEncoder, encoded: list[EncodedImage], photos: Path) -> None:
    for name, image in zip(PHOTOS, encoded, strict=True):
        frames = encoder.frames(load_image(photos / name))
        assert sum(frame.tile_rows * frame.tile_cols for frame in frames) == len(image.tiles)
        for frame in frames:
            assert frame.image.mode == "RGB"
            assert frame.image.size == (64 * frame.tile_cols, 64 * frame.tile_rows)
