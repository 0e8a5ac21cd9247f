"""Smoothing of a decoder's graph: the gains of its norms, its biases and its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.export.decoder.names import vectors_of, weights_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from hivtp.export.decoder.rounding.smoothing import Smoothing


def smooth_vectors(model: ir.Model, smoothing: Smoothing, config: Any) -> None:
    """Give norms and biases the values that they have in the smoothed model, in place."""
    import onnx_ir as ir
    import torch

    for name, original in vectors_of(config.num_hidden_layers).items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            continue
        found = smoothing.smoothed(original, torch.from_numpy(value.const_value.numpy().copy()))
        value.const_value = ir.tensor(found.numpy(), name=name)


def smoothed_matrix(
    matrix: NDArray[np.float32], node_name: str, smoothing: Smoothing, config: Any
) -> NDArray[np.float32]:
    """The matrix [out, in] of a node as the smoothed model has it: a new array."""
    import torch

    found = torch.from_numpy(matrix.copy())
    for name, outputs in weights_of(node_name, config).items():
        found[outputs] = smoothing.smoothed(name, found[outputs])
    smoothed: NDArray[np.float32] = found.numpy()
    return smoothed
