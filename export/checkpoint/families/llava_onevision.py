"""LLaVA-OneVision: tiles as in LLaVA-NeXT where an image is alone, of which many are interpolated to fewer tokens."""

from __future__ import annotations

from typing import Any

from hivtp.export.checkpoint.families.family import Family
from hivtp.export.checkpoint.families.llava_next import pinpoints_problem, preprocess, processor_problem
from hivtp.runtime.vision.interpolation import max_view_tiles


def _config_problem(config: Any) -> str | None:
    if max_view_tiles(config) is None:
        return (
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}; expected anyres_max_ and a number, as anyres_max_9"
        )
    return pinpoints_problem(config)


LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    title="LLaVA-OneVision",
    config_class="LlavaOnevisionConfig",
    image_processors=("LlavaOnevisionImageProcessor",),
    is_tiled=True,
    config_problem=_config_problem,
    processor_problem=processor_problem,
    preprocess=preprocess,
)
