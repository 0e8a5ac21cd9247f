"""Calibration: the largest activations over images, from which a graph in 8 bits takes its scales."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.export.graph.builder import GraphBuilder, Output, save_model
from hivtp.export.graph.linear import LinearLayers
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.tower import Tower
from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp_ops.spec import PruningSpec


def activation_maxima(
    checkpoint: Checkpoint,
    first_layer: int,
    runs: Iterable[NDArray[np.float32]],
    folder: Path,
) -> Mapping[str, NDArray[np.float32]]:
    """Maximum absolute input of each linear layer of a tower (amax), channel by channel.

    The graph that runs is the one that is exported, in float32, since biases are in other places in PyTorch.

    Args:
        checkpoint: only its vision weights are read.
        first_layer: 0-based, of those that are measured.
        runs: pixel values [tiles, 3, H, W] float32, each with as many tiles as memory has room for.
        folder: holds the float32 graph meanwhile.

    Returns:
        [in] float32 by the name of the weight.
    """
    model, outputs = _maxima_graph(checkpoint, first_layer)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "maxima.onnx"
        save_model(model, file)
        session = open_session(file)
        maxima: dict[str, NDArray[np.float32]] = {}
        for pixel_values in runs:
            found = session.run(list(outputs.values()), {"pixel_values": pixel_values})
            for weight, values in zip(outputs, found, strict=True):
                maxima[weight] = np.maximum(maxima.get(weight, 0), values)
        # The file is mapped into memory, and some systems do not delete mapped files.
        del session
    return maxima


def first_fp8_layer(spec: PruningSpec | None, shape: VisionShape) -> int:
    """The first layer after the scoring layers, 0-based; 0 without pruning.

    Up to the scoring layers an fp8 graph multiplies in half precision, so that it scores and keeps what fp16 does.

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


def _maxima_graph(checkpoint: Checkpoint, first_layer: int) -> tuple[ir.Model, Mapping[str, str]]:
    """The tower up to its last layer that runs, and for each weight the name of the output that is its maximum."""
    shape = VisionShape.of(checkpoint.config)
    graph = GraphBuilder(checkpoint.tensor, "fp32")
    linears = LinearLayers(graph)
    tower = Tower(linears, shape, checkpoint.config.vision_config, scoring_layers=range(0))
    hidden = tower.embed(graph.input("pixel_values", "FLOAT", ["tiles", 3, shape.image_size, shape.image_size]))
    for index in range(first_layer):
        hidden = tower.layer(index, hidden)
    before = set(linears.factors)
    for index in range(first_layer, shape.num_feature_layers):
        hidden = tower.layer(index, hidden)
    factors = {weight: value for weight, value in linears.factors.items() if weight not in before}
    outputs: dict[str, Output] = {}
    for weight, value in factors.items():
        name = f"{value.name}.maxima"
        if name not in outputs:
            absolute = graph.op("Abs", value, name=f"{value.name}.absolute")
            axes = graph.constant("axes_tokens", [0, 1])
            num_channels = checkpoint.tensor(weight).shape[1]
            outputs[name] = Output(
                graph.op("ReduceMax", absolute, axes, name=name, keepdims=0), "FLOAT", (num_channels,)
            )
    names = {weight: f"{value.name}.maxima" for weight, value in factors.items()}
    return graph.model(list(outputs.values()), tower.functions()), names
