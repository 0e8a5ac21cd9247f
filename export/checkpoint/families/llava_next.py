"""LLaVA-NeXT: an image is a base tile and a grid of tiles, of which each row ends with a newline token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.families.family import Family
from hivtp.runtime.inputs.tiling import Tiler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# Of the check alone: how many tiles an image may become is the user's choice at run time.
ANY_NUMBER = 2**31


def pinpoints_problem(config: Any) -> str | None:
    """What is wrong with the pinpoints of a config, for a message; None where nothing is."""
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    is_valid = isinstance(pinpoints, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(length) is int and length > 0 and length % side == 0 for length in pair)
        for pair in pinpoints
    )
    if not (is_valid and pinpoints):
        return f"image_grid_pinpoints is {pinpoints!r}; expected a list of [height, width] in multiples of {side}"
    return None


def processor_problem(config: Any, settings: dict[str, Any]) -> str | None:
    """See Family."""
    side = config.vision_config.image_size
    tiler = Tiler.from_config(settings, max_tiles=ANY_NUMBER)
    if tiler.tile_size != side:
        return f"the image processor cuts tiles of {tiler.tile_size} pixels, the vision tower takes {side} x {side}"
    if tiler.pinpoints != tuple(tuple(pair) for pair in config.image_grid_pinpoints):
        return "config.json and preprocessor_config.json have different image_grid_pinpoints"
    return None


def preprocess(settings: dict[str, Any], image: Image.Image) -> NDArray[np.float32]:
    """See Family."""
    return Tiler.from_config(settings, max_tiles=ANY_NUMBER)(image).pixel_values


LLAVA_NEXT = Family(
    model_type="llava_next",
    title="LLaVA-NeXT",
    config_class="LlavaNextConfig",
    image_processors=("LlavaNextImageProcessor",),
    is_tiled=True,
    config_problem=pinpoints_problem,
    processor_problem=processor_problem,
    preprocess=preprocess,
)
