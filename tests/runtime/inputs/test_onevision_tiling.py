"""The tiles of LLaVA-OneVision against its image processor in transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.tiling import ONEVISION_PINPOINTS, Tiler
from hivtp_ops.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from pathlib import Path

# As published, smaller.
SETTINGS = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[48 * rows, 48 * cols] for rows in range(1, 7) for cols in range(1, 7)],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 48, "width": 48},
}


@pytest.mark.parametrize("size", [(48, 48), (99, 40), (40, 99), (331, 457), (288, 288), (700, 60), (3, 2)])
@pytest.mark.parametrize("changes", [{}, {"image_mean": [0.1, 0.6, 0.7]}, {"resample": 2}], ids=str)
def test_tiles_are_those_of_transformers(photos: Path, size: tuple[int, int], changes: dict) -> None:
    original = LlavaOnevisionImageProcessorPil.from_dict(SETTINGS | changes)
    tiler = Tiler.from_config(json.loads(original.to_json_string()) | SETTINGS | changes, max_tiles=37)
    image, other = (load_image(photos / name).resize(size) for name in ("coffee.png", "chelsea.png"))
    found = tiler(image)
    [expected] = original([[image]], return_tensors="np")["pixel_values"]
    assert found.layout is not None
    assert len(found.pixel_values) == found.layout.num_tiles
    np.testing.assert_array_equal(found.pixel_values, expected)
    # With another image neither is cut.
    both = original([[image, other]], return_tensors="np")["pixel_values"]
    for each, pixels in zip((image, other), both, strict=True):
        alone = tiler(each, 2)
        np.testing.assert_array_equal(alone.pixel_values, pixels)
        assert alone.layout is not None
        assert alone.layout.num_tiles == 1
        assert alone.layout.patch_mask((4, 4)).all()


def test_what_is_absent_has_the_defaults_of_transformers() -> None:
    tiler = Tiler.from_config(
        {"image_processor_type": "LlavaOnevisionImageProcessorFast", "size": [384, 384]}, max_tiles=37
    )
    assert tiler.pinpoints == ONEVISION_PINPOINTS
    assert [list(pair) for pair in tiler.pinpoints] == LlavaOnevisionImageProcessorPil().image_grid_pinpoints
    assert tiler.tile_size == 384
    assert not tiler.cuts_several


def test_bounds_and_settings_that_cannot_work_are_refused(photos: Path) -> None:
    image = load_image(photos / "coffee.png")
    with pytest.raises(ImageError, match="and the limit is 4"):
        Tiler.from_config(SETTINGS, max_tiles=4)(image)
    # Not cut, it is one tile.
    assert len(Tiler.from_config(SETTINGS, max_tiles=4)(image, 2).pixel_values) == 1
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints\[0\] is \(50, 48\)"):
        Tiler.from_config(SETTINGS | {"image_grid_pinpoints": [[50, 48]]}, max_tiles=37)
