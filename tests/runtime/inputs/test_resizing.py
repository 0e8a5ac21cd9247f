from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.resizing import Box, Edges, read_size
from hivtp_ops.errors import CheckpointError, ImageError

IMAGE_SIZES = [(height, width) for height in (7, 64, 65, 99, 333) for width in (8, 64, 100, 337)]


@pytest.mark.parametrize("bounds", [(64, 64), (64, 90), (64, 63), (17, 301), (300, 299)])
def test_bounds_round_as_transformers_does(bounds: tuple[int, int]) -> None:
    for height, width in IMAGE_SIZES:
        assert Edges(*bounds).size_of(height, width) == get_size_with_aspect_ratio((height, width), *bounds)
        assert Box(*bounds).size_of(height, width) == get_image_size_for_max_height_width((height, width), *bounds)


@pytest.mark.parametrize(
    ("size", "is_square", "expected"),
    [
        (336, False, 336),
        (336, True, (336, 336)),
        ([336, 224], False, (336, 224)),
        ({"height": 336, "width": 224}, False, (336, 224)),
        ({"shortest_edge": 336}, False, 336),
        ({"shortest_edge": 336}, True, 336),
        ({"shortest_edge": 336, "longest_edge": 500}, False, Edges(336, 500)),
        ({"max_height": 336, "max_width": 500}, False, Box(336, 500)),
        # None of the forms.
        ({"longest_edge": 336}, False, {"longest_edge": 336}),
        ({"height": 336}, False, {"height": 336}),
        ({"shortest_edge": 336, "height": 336}, False, {"shortest_edge": 336, "height": 336}),
        (None, False, None),
    ],
)
def test_every_form_of_a_size_is_read(size: object, is_square: bool, expected: object) -> None:
    assert read_size(size, is_square=is_square) == expected


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 0, "longest_edge": 5},
        {"shortest_edge": 64, "longest_edge": None},
        {"max_height": 64, "max_width": -1},
        {"max_height": 1.5, "max_width": 64},
        {"longest_edge": 64},
    ],
)
def test_bounds_that_cannot_be_are_refused(size: dict) -> None:
    with pytest.raises(CheckpointError, match="image preprocessing: size is"):
        ImageProcessor.from_config({"image_processor_type": "CLIPImageProcessor", "size": size})


def test_bounds_need_a_crop_after_them() -> None:
    for bounds in (Edges(64, 90), Box(64, 64)):
        with pytest.raises(CheckpointError, match="the output would vary in size"):
            ImageProcessor(size=bounds, do_center_crop=False, do_pad=True)


def test_an_image_of_which_nothing_is_left_is_refused() -> None:
    processor = ImageProcessor(size=Box(64, 64), crop_size=(64, 64))
    image = Image.fromarray(np.zeros((1, 1000, 3), np.uint8))
    with pytest.raises(ImageError, match="would leave nothing of its shorter side; crop it first"):
        processor([image])
