"""Tiles of LLaVA-NeXT: how many are allowed, and how they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

    from hivtp.runtime.vision.cache import CachedEncoder

# Of three tiles, and of five.
WIDE, SQUARE = (128, 64), (128, 128)


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    return load_image(photos / "coffee.png")


def test_an_image_beyond_the_limit_of_tiles_is_refused_with_their_number(
    next_bundle: Path, open_encoder: Callable[..., CachedEncoder], photo: Image.Image
) -> None:
    encoder = open_encoder(next_bundle, max_tiles=4)
    assert len(encoder.prepare(photo.resize(WIDE)).pixel_values) == 3
    message = (
        "^an image of 128 x 128 pixels becomes a base tile and 2 x 2 more, 5 tiles, and the limit is 4; "
        "scale it down, or raise max_tiles$"
    )
    with pytest.raises(ImageError, match=message):
        encoder.prepare(photo.resize(SQUARE))


def test_tiles_of_all_images_run_in_chunks_of_the_size_set(
    next_bundle: Path, open_encoder: Callable[..., CachedEncoder], photo: Image.Image
) -> None:
    in_one, in_chunks = (open_encoder(next_bundle, max_tiles_per_run=size) for size in (8, 3))
    engine, num_tiles = in_chunks._encoder._vision.engine, []
    run = engine.run
    engine.run = lambda inputs: num_tiles.append(len(inputs["pixel_values"])) or run(inputs)
    images = [in_one.prepare(photo.resize(size)) for size in (SQUARE, WIDE, SQUARE)]
    found = in_chunks.encode(images)
    # Five and three tiles, of which the square's are asked for twice and run once.
    assert num_tiles == [3, 3, 2]
    for image, expected in zip(found, in_one.encode(images), strict=True):
        np.testing.assert_allclose(image.embeds, expected.embeds, atol=1e-5)
        for tile, other in zip(image.tiles, expected.tiles, strict=True):
            np.testing.assert_array_equal(tile.kept_indices, other.kept_indices)


def test_the_budget_is_spent_over_all_tiles(
    next_bundle: Path, open_encoder: Callable[..., CachedEncoder], photo: Image.Image
) -> None:
    encoder = open_encoder(next_bundle)
    for size in (WIDE, SQUARE, (400, 90)):
        [image] = encoder.encode([encoder.prepare(photo.resize(size))])
        assert sum(len(tile.kept_indices) for tile in image.tiles) == 60
        assert len(image.embeds) > 60
