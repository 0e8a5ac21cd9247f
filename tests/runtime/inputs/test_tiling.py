from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.tile_layout import TileLayout
from hivtp.runtime.inputs.tiling import DEFAULT_PINPOINTS, Tiler
from hivtp.runtime.vision.options import MAX_TILES
from hivtp_ops.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

TOLERANCE = 1e-6

# As preprocessor_config.json of llava-hf/llava-v1.6-vicuna-7b-hf has it.
LLAVA_16 = {
    "aspect_ratio_setting": "anyres",
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "LlavaNextImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaNextProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
# The same with tiles of 2 x 2 patches, for the tests that draw many pictures.
SMALL = LLAVA_16 | {
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
}
# LLaVA-OneVision's: every grid up to 6 x 6.
EVERY_GRID = [[28 * rows, 28 * cols] for rows, cols in itertools.product(range(1, 7), repeat=2)]
CONFIGS = {
    "llava 1.6": SMALL,
    "every grid": SMALL | {"image_grid_pinpoints": EVERY_GRID},
    "size of height and width": SMALL | {"size": {"height": 28, "width": 28}},
    "size as an int": SMALL | {"size": 28, "crop_size": 28},
    "no crop": SMALL | {"do_center_crop": False},
    "size larger than the crop": SMALL | {"size": {"shortest_edge": 35}},
    "size smaller than the crop": SMALL | {"size": {"shortest_edge": 20}},
    "stretched, then cropped": SMALL | {"size": {"height": 40, "width": 31}},
    "tiles are not resized": SMALL | {"do_resize": False, "size": {"shortest_edge": 40}},
    "bilinear, other colours": SMALL | {"resample": 2, "image_mean": 0.5, "image_std": [0.5, 0.4, 0.3]},
    "raw": SMALL | {"do_rescale": False, "do_normalize": False},
}
SIZES = [(3, 2), (2, 3), (2, 2), (28, 28), (55, 57), (400, 20), (20, 400), (2, 900), (900, 2), (640, 480), (337, 101)]

small_sizes = st.tuples(st.integers(2, 400), st.integers(2, 400))
any_sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000)) | st.tuples(st.integers(1, 20), st.integers(1, 90000))
grids = st.tuples(st.integers(1, 27), st.integers(1, 27))


def open_tiler(config: Mapping[str, Any], max_tiles: int = MAX_TILES) -> Tiler:
    return Tiler.from_config(config, max_tiles=max_tiles)


layouts = st.builds(TileLayout, st.integers(1, 6), st.integers(1, 6), any_sizes)


def picture(width: int, height: int) -> Image.Image:
    """Noise, on which every misplaced pixel shows."""
    rng = np.random.default_rng(width * 7919 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def original(config: Mapping[str, Any]) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(**{key: value for key, value in config.items() if not key.endswith("_type")})


def assert_equals_the_original(config: Mapping[str, Any], image: Image.Image) -> None:
    tiled = open_tiler(config)(image)
    expected = original(config)(image, return_tensors="np")
    assert tiled.pixel_values.dtype == np.float32
    assert len(tiled.pixel_values) == tiled.layout.num_tiles
    assert tiled.layout.image_size == tuple(expected["image_sizes"][0])
    np.testing.assert_allclose(tiled.pixel_values, expected["pixel_values"][0], rtol=0, atol=TOLERANCE)


def original_tokens(layout: TileLayout, grid: tuple[int, int]) -> torch.Tensor:
    """Raster indices of the patches of the whole tile grid that transformers keeps, as rows and columns."""
    rows, cols = layout.tile_rows * grid[0], layout.tile_cols * grid[1]
    return unpad_image(torch.arange(rows * cols).view(1, rows, cols), layout.image_size)[0]


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg", "page.png", "retina.jpg"])
def test_photographs_equal_the_original_at_full_size(name, photos: Path):
    assert_equals_the_original(LLAVA_16, load_image(photos / name))


@pytest.mark.parametrize("pinpoint", DEFAULT_PINPOINTS)
@pytest.mark.parametrize("box", [(0, 0, 512, 512), (0, 0, 512, 100), (200, 0, 300, 512), (150, 90, 381, 251)])
def test_every_pinpoint_equals_the_original_whatever_the_shape(pinpoint, box, photos: Path):
    image = load_image(photos / "astronaut.png").crop(box)
    assert_equals_the_original(LLAVA_16 | {"image_grid_pinpoints": [list(pinpoint)]}, image)


@pytest.mark.parametrize("pinpoint", EVERY_GRID, ids=str)
def test_every_grid_of_tiles_equals_the_original(pinpoint):
    config = SMALL | {"image_grid_pinpoints": [pinpoint]}
    for size in [(3, 2), (150, 40), (40, 150)]:
        assert_equals_the_original(config, picture(*size))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes_and_settings_equal_the_original(size, config):
    assert_equals_the_original(CONFIGS[config], picture(*size))


@settings(max_examples=100, deadline=None)
@given(small_sizes, st.lists(st.sampled_from(EVERY_GRID), min_size=1, max_size=5))
def test_any_size_and_any_pinpoints_equal_the_original(size, pinpoints):
    assert_equals_the_original(SMALL | {"image_grid_pinpoints": pinpoints}, picture(*size))


def test_a_huge_picture_equals_the_original():
    assert_equals_the_original(LLAVA_16, picture(400, 300).resize((4000, 3001), Image.Resampling.NEAREST))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_gets_a_white_ground_before_resizing_as_in_the_original(mode):
    image = picture(90, 60).convert(mode)
    image.info["transparency"] = image.getpixel((40, 30))
    assert_equals_the_original(SMALL, image)


@settings(max_examples=300, deadline=None)
@given(any_sizes, st.lists(st.sampled_from(EVERY_GRID), min_size=1, max_size=6))
def test_the_layout_is_the_grid_that_the_original_model_takes(size, pinpoints):
    layout = open_tiler(SMALL | {"image_grid_pinpoints": pinpoints}).layout(size)
    assert (layout.tile_rows, layout.tile_cols) == get_anyres_image_grid_shape(size, pinpoints, 28)


@settings(max_examples=500, deadline=None)
@given(layouts, grids)
@example(TileLayout(2, 2, (1000, 999)), (24, 24))
@example(TileLayout(3, 1, (90000, 3)), (24, 24))
@example(TileLayout(1, 3, (3, 90000)), (24, 24))
@example(TileLayout(3, 1, (90000, 3)), (5, 5))
@example(TileLayout(2, 2, (55, 176)), (24, 24))  # 14.999999999999998 of 48 rows
@example(TileLayout(2, 2, (176, 55)), (24, 24))
def test_unpadding_is_the_original(layout, grid):
    rows, cols = layout.tile_rows * grid[0], layout.tile_cols * grid[1]
    patches = np.arange(rows * cols).reshape(rows, cols)
    kept = patches[layout.patch_rows(grid), layout.patch_cols(grid)]
    np.testing.assert_array_equal(kept, original_tokens(layout, grid))


@settings(max_examples=200, deadline=None)
@given(layouts, grids)
def test_the_mask_tells_the_patches_that_unpadding_leaves_tile_by_tile(layout, grid):
    mask = layout.patch_mask(grid)
    assert mask.shape == (layout.num_tiles, grid[0] * grid[1])
    assert mask.dtype == np.bool_
    assert mask[0].all()
    kept = set(original_tokens(layout, grid).flatten().tolist())
    num_cols = layout.tile_cols * grid[1]
    for (tile, patch), is_picture in np.ndenumerate(mask[1:]):
        row = tile // layout.tile_cols * grid[0] + patch // grid[1]
        col = tile % layout.tile_cols * grid[1] + patch % grid[1]
        assert is_picture == (row * num_cols + col in kept)


@settings(max_examples=200, deadline=None)
@given(any_sizes)
def test_rows_and_columns_count_as_many_tokens_as_the_original_processor_writes(size):
    layout = open_tiler(LLAVA_16).layout(size)
    rows, cols = layout.patch_rows((24, 24)), layout.patch_cols((24, 24))
    num_rows, num_cols = rows.stop - rows.start, cols.stop - cols.start
    expected = LlavaNextProcessor._get_unpadded_features(
        SimpleNamespace(), *size, 24, 24, layout.tile_rows, layout.tile_cols
    )
    assert (num_rows * num_cols, num_rows) == expected


def test_the_base_tile_is_the_whole_picture_and_the_padding_black():
    red = Image.new("RGB", (56, 28), "red")
    tiler = open_tiler(SMALL | {"image_grid_pinpoints": [[56, 56]], "do_normalize": False})
    base, *tiles = tiler(red).pixel_values
    assert (base == np.array([1, 0, 0])[:, None, None]).all()
    for tile, picture_rows in zip(tiles, [slice(14, 28)] * 2 + [slice(0, 14)] * 2, strict=True):
        assert (tile[0, picture_rows] == 1).all()
        assert tile.sum() == 14 * 28


def test_the_image_given_is_not_changed():
    image = picture(50, 30)
    before = np.array(image)
    open_tiler(SMALL)(image)
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    "form", ["LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil"]
)
def test_all_forms_of_the_processor_are_read(form):
    assert open_tiler(LLAVA_16 | {"image_processor_type": form}) == open_tiler(LLAVA_16)


@pytest.mark.parametrize("config", [{}, {"image_processor_type": "CLIPImageProcessor"}])
def test_other_processors_are_refused_by_name(config):
    found = config.get("image_processor_type")
    with pytest.raises(CheckpointError, match=rf"is {found!r}; supported for tiles are LlavaNextImageProcessor"):
        open_tiler(config)


def test_the_default_pinpoints_are_those_of_the_original():
    assert [list(pinpoint) for pinpoint in DEFAULT_PINPOINTS] == LlavaNextImageProcessorPil.image_grid_pinpoints
    for absent in ({}, {"image_grid_pinpoints": None}):
        config = {key: value for key, value in LLAVA_16.items() if key != "image_grid_pinpoints"} | absent
        assert open_tiler(config).pinpoints == DEFAULT_PINPOINTS


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ([], r"image_grid_pinpoints is \(\); expected a list of one or more"),
        ("672", "image_grid_pinpoints is '672'; expected a list"),
        (672, "image_grid_pinpoints is 672; expected a list"),
        ({"height": 672}, "image_grid_pinpoints is .*height.*expected a list"),
        ([336, 672], r"image_grid_pinpoints\[0\] is 336; expected \[height, width\]"),
        ([[336, 672], [336]], r"image_grid_pinpoints\[1\] is \(336,\); expected"),
        ([[336, 672, 3]], r"\[0\] is \(336, 672, 3\)"),
        ([[336, 672], [336, "672"]], r"\[1\] is \(336, '672'\)"),
        ([[336, 672.0]], r"\[0\] is \(336, 672.0\)"),
        ([[336, True]], r"\[0\] is \(336, True\)"),
        ([[336, 0]], r"\[0\] is \(336, 0\)"),
        ([[336, -336]], r"\[0\] is \(336, -336\)"),
        ([[336, None]], r"\[0\] is \(336, None\)"),
        ([[336, 700]], r"\[0\] is \(336, 700\); expected .*both multiples of the tile size 336"),
    ],
)
def test_corrupt_pinpoints_are_shown(pinpoints, message):
    with pytest.raises(CheckpointError, match=message):
        open_tiler(LLAVA_16 | {"image_grid_pinpoints": pinpoints})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop_size": {"height": 336, "width": 224}}, r"tiles of 336 x 336 .*makes \(336, 224\) of each"),
        ({"do_center_crop": False, "size": 224}, r"tiles of 336 x 336 .*makes \(224, 224\) of each"),
        ({"size": {"longest_edge": 336}}, "size is .*longest_edge"),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "size is .*longest_edge"),
        ({"crop_size": 0}, r"crop_size is \(0, 0\)"),
        ({"image_std": [1, 0, 1]}, "image_std is .*none 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        open_tiler(LLAVA_16 | config)


def test_a_processor_that_resizes_by_the_shorter_side_is_refused():
    tiler = open_tiler(LLAVA_16)
    with pytest.raises(CheckpointError, match=r"size=336 .*expected a size of"):
        dataclasses.replace(tiler, image_processor=dataclasses.replace(tiler.image_processor, size=336))


def test_a_picture_that_needs_more_tiles_than_the_limit_is_refused_with_their_number():
    config = SMALL | {"image_grid_pinpoints": [[28, 28], [280, 280]]}
    with pytest.raises(ImageError, match=rf"300 x 200 pixels .* 10 x 10 more, 101 tiles, and the limit is {MAX_TILES}"):
        open_tiler(config)(picture(300, 200))
    assert len(open_tiler(config)(picture(20, 20)).pixel_values) == 2
    assert len(open_tiler(config, max_tiles=101)(picture(300, 200)).pixel_values) == 101


def test_the_limit_allows_every_usual_grid():
    largest = open_tiler(SMALL | {"image_grid_pinpoints": EVERY_GRID}).layout((5000, 5000))
    assert largest.num_tiles == MAX_TILES


def test_a_picture_that_would_swell_on_its_way_is_refused():
    image = Image.new("RGB", (2, 300_000))
    with pytest.raises(ImageError, match=r"2 x 300000 pixels is too long and thin: .*336 x 300000 pixels; crop it"):
        open_tiler(LLAVA_16)(image)


@pytest.mark.parametrize("size", [(2, 200_000), (400_000, 2)])
def test_a_long_and_thin_picture_within_the_limit_equals_the_original(size):
    assert_equals_the_original(SMALL, picture(*size))
