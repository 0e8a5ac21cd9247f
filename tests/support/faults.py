"""Bundles with a fault in them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    from pathlib import Path

# Of the tiny checkpoint: what decides which patches are kept, and what comes after the decision.
SCORING_WEIGHT = "vision.encoder.layers.2.self_attn.q_proj.weight"
LATER_WEIGHT = "projector.linear_2.weight"


def alter_weight(bundle: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of a bundle with one weight of its vision graph scaled; of the right size, and with its old manifest."""
    shutil.copytree(bundle, target)
    graph = onnx.load(target / "vision" / "model.onnx", load_external_data=False).graph
    [weight] = (item for item in graph.initializer if item.name.startswith(name))
    place = {entry.key: entry.value for entry in weight.external_data}
    with (target / "vision" / place["location"]).open("r+b") as file:
        file.seek(int(place.get("offset", 0)))
        values = np.frombuffer(file.read(int(place["length"])), np.float32) * np.float32(factor)
        file.seek(int(place.get("offset", 0)))
        file.write(values.tobytes())
    return target
