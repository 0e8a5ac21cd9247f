"""The image preprocessing of a checkpoint: the settings that a bundle takes, and whether it then does the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hivtp.export.checkpoint.config import FAMILIES
from hivtp_ops.errors import CheckpointError, HivtpError

if TYPE_CHECKING:
    from hivtp.export.checkpoint.folder import Checkpoint

# (width, height) of generated images: one wide, one high.
PROBE_SIZES = ((60, 37), (41, 70))


def image_settings(checkpoint: Checkpoint, image_processor: Any) -> dict[str, Any]:
    """The settings of an image processor, complete, after trying them on images.

    Args:
        checkpoint: an open checkpoint.
        image_processor: as transformers opened it.

    Raises:
        CheckpointError: it is of another class, does not fit the vision tower, or a setting is not supported.
    """
    folder, family = checkpoint.folder, FAMILIES[checkpoint.family]
    name = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in family.image_processors:
        raise CheckpointError(
            f"{folder} has the image processor {name!r}; supported are {', '.join(family.image_processors)}"
        )
    # transformers has written a bare number out by now, and this says how.
    written_out = {"image_processor_type": name, "default_to_square": False}
    settings: dict[str, Any] = json.loads(image_processor.to_json_string()) | written_out
    try:
        problem = family.processor_problem(checkpoint.config, settings) or _difference(
            family, image_processor, settings
        )
    except HivtpError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")
    return settings


def _difference(family: Any, image_processor: Any, settings: dict[str, Any]) -> str | None:
    """Where a bundle would make other pixels than transformers: of settings that neither refuses."""
    random = np.random.default_rng(0)
    for width, height in PROBE_SIZES:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            expected = image_processor(image, return_tensors="np")["pixel_values"]
        except Exception as error:  # noqa: BLE001  whatever the library raises on odd settings
            return f"transformers cannot preprocess an image as its preprocessor_config.json says: {error}"
        found = family.preprocess(settings, image)
        if not np.array_equal(found, np.asarray(expected).reshape(-1, *expected.shape[-3:])):
            return (
                "hivtp preprocesses images in another way than transformers does with its preprocessor_config.json, of "
                f"which the settings are {settings}; set those that the published checkpoints of {family.title} have"
            )
    return None
