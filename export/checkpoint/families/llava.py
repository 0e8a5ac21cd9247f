"""LLaVA-1.5: an image is one tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.families.family import Family
from hivtp.runtime.inputs.image_processor import ImageProcessor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


def _config_problem(_config: Any) -> str | None:
    return None


def _processor_problem(config: Any, settings: dict[str, Any]) -> str | None:
    side = config.vision_config.image_size
    height, width = ImageProcessor.from_config(settings).output_size
    if (height, width) != (side, side):
        return (
            f"the image processor makes {height} x {width} pixels of an image, the vision tower takes {side} x {side}"
        )
    return None


def _preprocess(settings: dict[str, Any], image: Image.Image) -> NDArray[np.float32]:
    return ImageProcessor.from_config(settings)([image])


LLAVA = Family(
    model_type="llava",
    title="LLaVA-1.5",
    config_class="LlavaConfig",
    image_processors=("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"),
    is_tiled=False,
    config_problem=_config_problem,
    processor_problem=_processor_problem,
    preprocess=_preprocess,
)
