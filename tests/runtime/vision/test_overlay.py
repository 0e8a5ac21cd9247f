from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.overlay import GLOBAL, KEPT, LEGEND_HEIGHT_PIXELS, LOCAL, draw_overlay
from hivtp_ops.errors import ImageError

PROCESSOR = ImageProcessor(size=336, crop_size=(336, 336))
GRID = (24, 24)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return load_image(Path(skimage.__file__).parent / "data" / "chelsea.png")


def patches(overlay: Image.Image, grid: tuple[int, int] = GRID) -> np.ndarray:
    """Cut an overlay without its legend into [rows, cols, height, width, 3]."""
    pixels = np.asarray(overlay)[:-LEGEND_HEIGHT_PIXELS].astype(int)
    rows, cols = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // cols
    return pixels.reshape(rows, height, cols, width, 3).swapaxes(1, 2)


def outline_colours(overlay: Image.Image) -> np.ndarray:
    return patches(overlay)[:, :, 0, 0].reshape(-1, 3)


def test_kept_patches_are_clear_and_dropped_ones_dark_and_grey(photo):
    kept = np.array([0, 30, 31, 300, 575])
    inner = patches(draw_overlay(PROCESSOR.frame(photo), GRID, kept))[:, :, 1:-1, 1:-1].reshape(576, -1, 3)
    enlarged = PROCESSOR.frame(photo).resize((672, 672), Image.Resampling.BICUBIC)
    clear = np.asarray(enlarged).reshape(24, 28, 24, 28, 3).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    clear = clear.reshape(576, -1, 3)

    np.testing.assert_array_equal(inner[kept], clear[kept])
    dropped = np.delete(inner, kept, axis=0)
    assert (dropped == dropped[..., :1]).all()
    assert dropped.mean() < 0.5 * np.delete(clear, kept, axis=0).mean()


def test_kept_patches_and_no_others_are_outlined(photo):
    kept = np.array([3, 100, 575])
    is_outlined = (outline_colours(draw_overlay(PROCESSOR.frame(photo), GRID, kept)) == KEPT).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(is_outlined), kept)


def test_each_stage_has_its_colour(photo):
    kept = np.array([5, 6, 80, -1, -1])
    is_global = np.array([True, False, True, True, False])
    colours = outline_colours(draw_overlay(PROCESSOR.frame(photo), GRID, kept, is_global))
    np.testing.assert_array_equal(np.flatnonzero((colours == GLOBAL).all(axis=1)), [5, 80])
    np.testing.assert_array_equal(np.flatnonzero((colours == LOCAL).all(axis=1)), [6])


def test_the_legend_shows_the_colours_of_the_stages(photo):
    def legend_colours(is_global: np.ndarray | None) -> set[tuple[int, ...]]:
        overlay = draw_overlay(PROCESSOR.frame(photo), GRID, np.array([1, 2]), is_global)
        return set(map(tuple, np.asarray(overlay)[-LEGEND_HEIGHT_PIXELS:].reshape(-1, 3).tolist()))

    assert {GLOBAL, LOCAL} <= legend_colours(np.array([True, False]))
    assert not {GLOBAL, LOCAL} & legend_colours(None)


def test_indices_of_minus_one_are_no_patches(photo):
    padded = draw_overlay(PROCESSOR.frame(photo), GRID, np.array([7, 9, -1, -1]))
    assert padded.tobytes() == draw_overlay(PROCESSOR.frame(photo), GRID, np.array([7, 9])).tobytes()


def test_nothing_kept_is_a_picture_too(photo):
    overlay = draw_overlay(PROCESSOR.frame(photo), GRID, np.array([], dtype=np.int64))
    assert not (outline_colours(overlay) == KEPT).all(axis=1).any()


@pytest.mark.parametrize(
    ("height", "width", "grid", "size"),
    [
        (336, 336, (24, 24), (672, 672)),
        (224, 224, (16, 16), (672, 672)),
        (60, 90, (6, 9), (1080, 720)),
        (700, 900, (7, 9), (900, 700)),
        (384, 384, (27, 27), (756, 756)),
        (4, 4, (2, 2), (672, 672)),
    ],
)
def test_the_picture_is_large_enough_and_whole_patches(height, width, grid, size, photo):
    processor = ImageProcessor(do_center_crop=False, size=(height, width))
    overlay = draw_overlay(processor.frame(photo), grid, np.array([0]))
    assert overlay.mode == "RGB"
    assert overlay.size == (size[0], size[1] + LEGEND_HEIGHT_PIXELS)
    assert min(size) >= 672
    assert patches(overlay, grid).shape[:2] == grid


def test_the_arguments_are_not_changed(photo):
    pixels, kept, is_global = np.array(photo), np.array([4, -1]), np.array([True, False])
    draw_overlay(PROCESSOR.frame(photo), GRID, kept, is_global)
    np.testing.assert_array_equal(np.asarray(photo), pixels)
    np.testing.assert_array_equal(kept, [4, -1])
    np.testing.assert_array_equal(is_global, [True, False])


@pytest.mark.parametrize("index", [576, 10_000, -2])
def test_an_index_outside_of_the_grid_is_refused(index, photo):
    with pytest.raises(ImageError, match=rf"kept_indices hold {index}; expected -1 or 0\.\.575"):
        draw_overlay(PROCESSOR.frame(photo), GRID, np.array([0, index]))


@pytest.mark.parametrize("kept", [np.zeros((1, 4), np.int64), np.zeros(4, np.float32), np.ones(576, bool)])
def test_indices_of_another_form_are_refused(kept, photo):
    with pytest.raises(ImageError, match=r"expected \[num\] integers"):
        draw_overlay(PROCESSOR.frame(photo), GRID, kept)


@pytest.mark.parametrize("is_global", [np.ones(3, bool), np.ones(2, np.int64)])
def test_stages_that_do_not_match_the_indices_are_refused(is_global, photo):
    with pytest.raises(ImageError, match=r"is_global is of shape .*expected bool of the shape of kept_indices"):
        draw_overlay(PROCESSOR.frame(photo), GRID, np.array([1, 2]), is_global)


@pytest.mark.parametrize("grid", [(0, 24), (337, 24), (24, 1000)])
def test_a_grid_that_does_not_fit_is_refused(grid, photo):
    with pytest.raises(ImageError, match="does not fit 336 x 336 pixels"):
        draw_overlay(PROCESSOR.frame(photo), grid, np.array([-1]))


def test_the_picture_can_be_saved(photo, tmp_path):
    overlay = draw_overlay(PROCESSOR.frame(photo), GRID, np.arange(0, 576, 5))
    overlay.save(tmp_path / "overlay.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "overlay.png")), np.asarray(overlay))
