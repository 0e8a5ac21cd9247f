"""What graphs are checked on: generated tiles, and generated files of images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

# What an int8 graph is calibrated on: which channels are large is a property of the tower more than of the image.
NUM_CALIBRATION_TILES = 2
# Tag 274 of EXIF: how to turn the stored image. 6 is by a quarter.
_ORIENTATION, _QUARTER_TURN = 274, 6


def sample_pixels(num_tiles: int, image_size: int) -> NDArray[np.float32]:
    """Generated tiles, normalised: soft colour fields with sharp rectangles and a little noise.

    Returns:
        [tiles, 3, image_size, image_size] float32, the same at every call.
    """
    rng = np.random.default_rng(2509_23663)
    axis = np.linspace(0, 2 * np.pi, image_size, dtype=np.float32)
    rows, columns = axis[:, None], axis[None, :]
    tiles = np.empty((num_tiles, 3, image_size, image_size), np.float32)
    for channel in tiles.reshape(-1, image_size, image_size):
        phase, frequency = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.5, 3, 2)
        channel[:] = np.sin(frequency[0] * rows + phase[0]) + np.cos(frequency[1] * columns + phase[1])
    for tile in tiles:
        for _ in range(6):
            top, left = rng.integers(0, image_size * 3 // 4, 2)
            height, width = rng.integers(image_size // 16, image_size // 3, 2)
            tile[:, top : top + height, left : left + width] = rng.uniform(-1.8, 2.0, (3, 1, 1))
    # Over all, so that no two patches are alike and scores do not tie.
    tiles += rng.normal(0, 0.1, tiles.shape).astype(np.float32)
    return tiles


def generated_runs(image_size: int) -> Iterator[NDArray[np.float32]]:
    """Generated tiles for a calibration, [1, 3, image_size, image_size] float32 each."""
    yield from np.split(sample_pixels(NUM_CALIBRATION_TILES, image_size), NUM_CALIBRATION_TILES)


def sample_patch_mask(num_tiles: int, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask as LLaVA-NeXT has it: the first tile whole, the others with padding above and below.

    Returns:
        [tiles, patches] bool, False for padding.
    """
    rows, cols = grid
    mask = np.ones((num_tiles, rows, cols), dtype=np.bool_)
    mask[1:, : rows // 4] = mask[1:, rows - rows // 4 :] = False
    return mask.reshape(num_tiles, rows * cols)


def sample_files() -> dict[str, bytes]:
    """Encoded images as people send them, by what is special about each.

    A photograph of odd size as JPEG, and a transparent PNG that EXIF turns by a quarter.
    """
    from PIL import Image

    height, width = 331, 457
    colours = sample_pixels(1, max(height, width))[0, :, :height, :width]
    pixels = np.clip((colours * 48 + 128).transpose(1, 2, 0), 0, 255).astype(np.uint8)
    photograph = Image.fromarray(pixels)
    transparent = photograph.convert("RGBA").crop((0, 0, 203, 117))
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    exif = Image.Exif()
    exif[_ORIENTATION] = _QUARTER_TURN
    files = {"a photograph": io.BytesIO(), "a transparent image that EXIF turns": io.BytesIO()}
    jpeg, png = files.values()
    photograph.save(jpeg, "JPEG", quality=90)
    transparent.save(png, "PNG", exif=exif)
    return {name: file.getvalue() for name, file in files.items()}
