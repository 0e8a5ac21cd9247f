"""The weights that a written decoder computes with, dequantised, under the names of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.decoder.names import weights_of
from hivtp.export.graph.linear import INT8_PRODUCT

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint


class DecoderWeights:
    """Reads weights as a decoder of the model builder holds them: quantised ones are dequantised.

    Args:
        checkpoint: gives the weights that the decoder does not quantise.
        file: the decoder.
    """

    def __init__(self, checkpoint: Checkpoint, file: Path) -> None:
        import onnx_ir as ir

        self._checkpoint = checkpoint
        # By the weight's name: the node that holds it, and which of the node's rows.
        self._places: dict[str, tuple[ir.Node, slice]] = {}
        for node in ir.load(file).graph:
            if node.op_type in ("MatMulNBits", INT8_PRODUCT):
                for name, rows in weights_of(node.name or "", checkpoint.config.text_config).items():
                    self._places[name] = (node, rows)

    def tensor(self, name: str) -> torch.Tensor:
        """A weight by its name in the causal language model, [out, in] float32 where the decoder rounds it."""
        rounded = self.rounded(name)
        return self._checkpoint.language_tensor(name) if rounded is None else rounded

    def rounded(self, name: str) -> torch.Tensor | None:
        """The same; None for a weight that the decoder holds as the checkpoint does."""
        import torch

        if name not in self._places:
            return None
        node, rows = self._places[name]
        return torch.from_numpy(dequantize(node, rows))


def dequantize(node: Any, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Rows of the weight [out, in] float32 of a com.microsoft node.

    Args:
        node: a MatMulNBits with blocks of 4 or 8 bits, or what quantize_products leaves.
        rows: which.
    """
    if node.op_type == INT8_PRODUCT:
        matrix, channel_scales = (node.inputs[index].const_value.numpy() for index in (1, 3))
        return np.ascontiguousarray((matrix[:, rows] * channel_scales[rows]).T)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    packed, scales = (node.inputs[index].const_value.numpy() for index in (1, 2))
    num_out, num_in, bits = attributes["N"], attributes["K"], attributes["bits"]
    packed, scales = packed.reshape(num_out, -1)[rows], scales.reshape(num_out, -1, 1)[rows]
    if bits == 4:
        packed = _unpacked(packed)
    values = packed.reshape(len(packed), -1, attributes["block_size"]).astype(np.float32)
    # In place: at 7 B the float32 weights of one layer take 0.8 GB.
    if len(node.inputs) > 3:
        zero_points = node.inputs[3].const_value.numpy().reshape(num_out, -1)[rows]
        zero_points = _unpacked(zero_points) if bits == 4 else zero_points
        # An odd number of blocks leaves half a byte over.
        values -= zero_points.reshape(len(packed), -1, 1)[:, : values.shape[1]]
    else:
        values -= 1 << (bits - 1)
    values *= scales
    return np.ascontiguousarray(values.reshape(len(packed), -1)[:, :num_in])


def _unpacked(packed: NDArray[Any]) -> NDArray[Any]:
    """Two values in a byte, the lower half first, along the last axis."""
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
