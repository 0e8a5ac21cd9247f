"""Whether a disk has room for a bundle, told before the work."""

from __future__ import annotations

import math
import re
import shutil
from typing import TYPE_CHECKING

from hivtp.export.graph.shape import VisionShape
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.settings import ExportSettings

# Bytes that a weight takes at least.
BYTES_PER_WEIGHT: Mapping[str, float] = {
    "fp32": 4,
    "fp16": 2,
    "fp8": 1,
    "int8": 1,
    "w8a8": 1,
    "int4": 0.5,
    "int4-fp16": 0.5,
}
_TOWER_LAYER = re.compile(r"^vision\.encoder\.layers\.(\d+)\.")


def check_space(checkpoint: Checkpoint, settings: ExportSettings, folder: Path) -> None:
    """Refuse a disk that cannot hold the bundle.

    Args:
        checkpoint: what is exported.
        settings: what to export.
        folder: on the disk.

    Raises:
        BundleError: it has less room than the bundle takes at least.
    """
    needed, free = min_bytes(checkpoint, settings), shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"the bundle takes at least {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left; nothing was "
            "written: free some space, choose a lower precision, or give another destination"
        )


def min_bytes(checkpoint: Checkpoint, settings: ExportSettings) -> float:
    """What a bundle takes at least. A decoder that is taken over may be linked, and then takes nothing."""
    num_feature_layers = VisionShape.of(checkpoint.config).num_feature_layers
    sizes = {"vision": BYTES_PER_WEIGHT[settings.vision_precision], "projector": 0.0, "language": 0.0}
    if settings.graph == "vision":
        sizes["projector"] = sizes["vision"]
    if settings.decoder is not None and settings.decoder_from is None:
        decoder = settings.decoder
        sizes["language"] = sum(
            BYTES_PER_WEIGHT[kind] for kind in (decoder.precision, decoder.prefill_precision) if kind
        )
    total = 0.0
    for name, location in checkpoint.locations.items():
        layer = _TOWER_LAYER.match(name)
        is_written = not name.startswith(("vision.post_layernorm.", "vision.head."))
        if is_written and (layer is None or int(layer[1]) < num_feature_layers):
            total += math.prod(location.shape) * sizes.get(name.partition(".")[0], 0)
    return total
