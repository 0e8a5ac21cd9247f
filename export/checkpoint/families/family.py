"""What tells one family of LLaVA checkpoints from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        model_type: of its config, and its name in a manifest.
        title: as people call it.
        config_class: of its config in transformers.
        image_processors: classes of transformers that it comes with, without their endings Fast and Pil.
        is_tiled: whether an image becomes a base tile and a grid of tiles, with an `image_newline` after each row.
        config_problem: what is wrong with a config, for a message; None where nothing is.
        processor_problem: the same for a config and the settings of its image processor, as transformers writes them.
        preprocess: pixels [tiles, 3, H, W] float32 of an image with these settings, as a bundle makes them.
    """

    model_type: str
    title: str
    config_class: str
    image_processors: tuple[str, ...]
    is_tiled: bool
    config_problem: Callable[[Any], str | None]
    processor_problem: Callable[[Any, dict[str, Any]], str | None]
    preprocess: Callable[[dict[str, Any], Image.Image], NDArray[np.float32]]
