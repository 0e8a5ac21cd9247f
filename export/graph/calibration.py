"""Calibration: the largest activations over images, from which an fp8 graph takes its scales."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.engines.onnxruntime import open_session
from hivtp.export.graph.builder import GraphBuilder, Output, save_model
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.tower import Tower
from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp_ops.spec import PruningSpec


def activation_maxima(
    checkpoint: Checkpoint,
    spec: PruningSpec | None,
    runs: Iterable[NDArray[np.float32]],
    folder: Path,
) -> Mapping[str, float]:
    """Maximum absolute input of each linear layer after the scoring layers (amax).

    Up to the scoring layers an fp8 graph multiplies in half precision, so that it scores and keeps what fp16 does.
    The graph that runs is the one that is exported, in float32, since biases are in other places there.

    Args:
        checkpoint: only its vision weights are read.
        spec: with its layers resolved; None for no pruning, where every layer is calibrated.
        runs: pixel values [tiles, 3, H, W] float32, each with as many tiles as memory has room for.
        folder: holds the float32 graph meanwhile.

    Returns:
        By the name of the weight.

    Raises:
        SpecError: the scoring layers are the last that run.
    """
    model, outputs = _maxima_graph(checkpoint, spec)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "maxima.onnx"
        save_model(model, file)
        session = open_session(file)
        maxima = dict.fromkeys(outputs, 0.0)
        for pixel_values in runs:
            found = session.run(list(outputs.values()), {"pixel_values": pixel_values})
            maxima = {weight: max(maxima[weight], float(value)) for weight, value in zip(outputs, found, strict=True)}
        # The file is mapped into memory, and some systems do not delete mapped files.
        del session
    return maxima


def first_fp8_layer(spec: PruningSpec | None, shape: VisionShape) -> int:
    """The first layer after the scoring layers, 0-based; 0 without pruning.

    Args:
        spec: with its layers resolved.
        shape: of the tower.

    Raises:
        SpecError: none of those that run comes after them.
    """
    if spec is None:
        return 0
    first = spec.scoring_layers.stop
    if first >= shape.num_feature_layers:
        raise SpecError(
            f"fp8 is for the layers after the scoring layers, and layer {first - 1} is the last of the "
            f"{shape.num_feature_layers} that run; choose fp16"
        )
    return first


def _maxima_graph(checkpoint: Checkpoint, spec: PruningSpec | None) -> tuple[ir.Model, Mapping[str, str]]:
    """The tower up to the feature layer, and for each weight the name of the output that is its maximum."""
    shape = VisionShape.of(checkpoint.config)
    first = first_fp8_layer(spec, shape)
    graph = GraphBuilder(checkpoint.tensor, "fp32")
    tower = Tower(graph, shape, checkpoint.config.vision_config, scoring_layers=range(0))
    hidden = tower.embed(graph.input("pixel_values", "FLOAT", ["tiles", 3, shape.image_size, shape.image_size]))
    for index in range(first):
        hidden = tower.layer(index, hidden)
    in_half = set(graph.factors)
    for index in range(first, shape.num_feature_layers):
        hidden = tower.layer(index, hidden)
    factors = {weight: value for weight, value in graph.factors.items() if weight not in in_half}
    outputs: dict[str, Output] = {}
    for value in factors.values():
        name = f"{value.name}.maximum"
        if name not in outputs:
            absolute = graph.op("Abs", value, name=f"{value.name}.absolute")
            outputs[name] = Output(graph.op("ReduceMax", absolute, name=name, keepdims=0), "FLOAT", ())
    names = {weight: f"{value.name}.maximum" for weight, value in factors.items()}
    return graph.model(list(outputs.values()), tower.functions()), names
