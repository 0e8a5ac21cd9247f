"""The weights that a written vision graph computes with, dequantised, under the names of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.export.graph.linear import BLOCK_PRODUCT
from hivtp.export.graph.rounding import ZERO_POINT

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class VisionWeights:
    """Reads the rounded weights of a vision graph.

    Args:
        file: the graph.
    """

    def __init__(self, file: Path) -> None:
        import onnx_ir as ir

        graph = ir.load(file).graph
        self._initializers = graph.initializers
        # A last block is filled up, so its weight does not say how many inputs there are.
        products = [(node.inputs[1], node.attributes) for node in graph if node.op_type == BLOCK_PRODUCT]
        self._num_inputs = {
            str(weight.name): attributes["K"].as_int() for weight, attributes in products if weight is not None
        }

    def rounded(self, name: str) -> torch.Tensor | None:
        """A weight [out, in] float32 by its canonical name; None where the graph does not round it to 8 bits."""
        import torch

        for kind in ("int8", "fp8"):
            if f"{name}.{kind}" in self._initializers:
                matrix = self._read(f"{name}.{kind}").astype(np.float32) * self._read(f"{name}.scale").astype(
                    np.float32
                )
                return torch.from_numpy(np.ascontiguousarray(matrix.T))
        if f"{name}.blocks" in self._initializers:
            whole = self._read(f"{name}.blocks").astype(np.float32) - ZERO_POINT
            blocks = whole * self._read(f"{name}.scale")[:, :, None]
            return torch.from_numpy(blocks.reshape(len(blocks), -1)[:, : self._num_inputs[f"{name}.blocks"]])
        return None

    def is_in_blocks(self, name: str) -> bool:
        """Whether the graph holds a weight in blocks of inputs."""
        return f"{name}.blocks" in self._initializers

    def gains(self, name: str) -> torch.Tensor | None:
        """Those of a norm [width] float32 by their canonical name; None where the graph has them under another."""
        import torch

        if name not in self._initializers:
            return None
        return torch.from_numpy(self._read(name).astype(np.float32))

    def _read(self, name: str) -> np.ndarray:
        tensor = self._initializers[name].const_value
        assert tensor is not None, "an initializer has a value"
        values: np.ndarray = tensor.numpy()
        return values
