"""Linear layers of a vision graph, in the precision of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.export.graph.builder import MICROSOFT
from hivtp.export.graph.rounding import (
    MAX_INT8,
    ZERO_POINT,
    fp8_scale,
    quantize_fp8,
    quantize_in_blocks,
    quantize_per_channel,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from hivtp.export.graph.builder import GraphBuilder

# One operator multiplies in int8 and scales; ONNX Runtime has it on the CPU.
INT8_PRODUCT = "MatMulIntegerToFloat"
# One operator for a weight in blocks. Its level 4 rounds activations to int8, block by block, in the kernel.
BLOCK_PRODUCT, INT8_ACTIVATIONS = "MatMulNBits", 4
# For a token, or a position, of zeros, which would have a scale of zero.
MIN_SIZE = 1e-30


class LinearLayers:
    """Adds linear layers to a graph.

    In an "int8" graph a layer is multiplied in one of two ways, and in both a token gives what it gives alone:

    * per token: a weight has one scale per output channel, an activation one per token, found at run time.
      Source: ZeroQuant (arXiv 2206.01861), token-wise activations.
    * in blocks: weight and activation have one scale for each block of inputs, so that a channel of outliers makes
      its own block coarse and no other one. That is slower, and for what the scores depend on.

    Args:
        graph: where they are added.
        maxima: of a graph in "fp8" only: the largest absolute value that each input channel of a layer takes, by the
            name of its weight; layers that it does not name stay in half precision.

    Attributes:
        factors: by the name of a layer's weight its input.
    """

    def __init__(self, graph: GraphBuilder, maxima: Mapping[str, np.ndarray] | None = None) -> None:
        assert (maxima is not None) == (graph.precision == "fp8"), "the scales of fp8 are calibrated, and no others"
        self.graph = graph
        self.factors: dict[str, ir.Value] = {}
        self._maxima = maxima or {}
        # By the name of a value, since queries, keys and values round theirs once.
        self._rounded: dict[str, tuple[ir.Value, ir.Value]] = {}

    def add(
        self, value: ir.Value, weight: str, bias: str | ir.Value | None, name: str, block_size: int | None = None
    ) -> ir.Value:
        """`value @ weight.T + bias` with a torch linear layer's [out, in] weight.

        Args:
            value: [tiles, tokens, in].
            weight: its name.
            bias: its name, or a value; None for none.
            name: of the result.
            block_size: in an "int8" graph inputs that share a scale; None for one scale per token.
        """
        self.factors[weight] = value
        product = self._product(value, weight, name, block_size)
        if bias is None:
            return product
        graph = self.graph
        return graph.op("Add", product, graph.weight(bias) if isinstance(bias, str) else bias, name=name)

    def _product(self, value: ir.Value, weight: str, name: str, block_size: int | None) -> ir.Value:
        if self.graph.precision == "int8":
            if block_size is None:
                return self._int8_product(value, weight, name)
            return self._block_product(value, weight, name, block_size)
        if weight in self._maxima:
            return self._fp8_product(value, weight, name)
        return self.graph.matmul(value, weight, name)

    def _int8_product(self, value: ir.Value, weight: str, name: str) -> ir.Value:
        graph = self.graph
        matrix, scale = quantize_per_channel(graph.read(weight))
        rounded, value_scale = self._round_tokens(value)
        inputs = (
            rounded,
            graph.constant(f"{weight}.int8", matrix),
            self._one(),
            graph.constant(f"{weight}.scale", scale),
            self._zero_point(),
        )
        product = graph.op(INT8_PRODUCT, *inputs, name=f"{name}.unscaled", domain=MICROSOFT)
        return graph.op("Mul", product, value_scale, name=f"{name}.matmul")

    def _round_tokens(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A value in uint8 around ZERO_POINT, since CPUs multiply uint8 by int8, and its scales [tiles, tokens, 1]."""
        graph, name = self.graph, str(value.name)
        if name not in self._rounded:
            size = graph.op("Abs", value, name=f"{name}.sizes")
            axis = graph.constant("axis_last", [-1])
            size = graph.op("ReduceMax", size, axis, name=f"{name}.largest", keepdims=1)
            size = graph.op(
                "Max", size, graph.constant("int8.least", np.array(MIN_SIZE, np.float32)), name=f"{name}.size"
            )
            step = graph.constant("int8.step", np.array(1 / MAX_INT8, np.float32))
            scale = graph.op("Mul", size, step, name=f"{name}.scale")
            # Divided first, then rounded by a scale of one: an operator that rounds by a scale per token is slower.
            steps = graph.op("Div", value, scale, name=f"{name}.steps")
            one, zero_point = self._one(), self._zero_point()
            self._rounded[name] = graph.op("QuantizeLinear", steps, one, zero_point, name=f"{name}.uint8"), scale
        return self._rounded[name]

    def _block_product(self, value: ir.Value, weight: str, name: str, block_size: int) -> ir.Value:
        graph, matrix = self.graph, self.graph.read(weight)
        blocks, scale = quantize_in_blocks(matrix, block_size)
        inputs = (value, graph.constant(f"{weight}.blocks", blocks), graph.constant(f"{weight}.scale", scale))
        attributes = {"K": matrix.shape[1], "N": matrix.shape[0], "bits": 8, "block_size": block_size}
        return graph.op(
            BLOCK_PRODUCT,
            *inputs,
            name=f"{name}.matmul",
            domain=MICROSOFT,
            accuracy_level=INT8_ACTIVATIONS,
            **attributes,
        )

    def _fp8_product(self, value: ir.Value, weight: str, name: str) -> ir.Value:
        # TensorRT multiplies in fp8 where both factors come from a DequantizeLinear; other engines round in the same
        # way, and multiply in a wider type.
        graph = self.graph
        matrix, scale = quantize_fp8(graph.read(weight))
        inputs = (graph.constant(f"{weight}.fp8", matrix), graph.constant(f"{weight}.scale", scale), self._zero_fp8())
        factor = graph.op("DequantizeLinear", *inputs, name=f"{weight}.half")
        rounded = self._through_fp8(value, float(self._maxima[weight].max()))
        return graph.op("MatMul", rounded, factor, name=f"{name}.matmul")

    def _through_fp8(self, value: ir.Value, maximum: float) -> ir.Value:
        """A value, rounded to fp8; values beyond the maximum are clipped to it."""
        graph, name = self.graph, str(value.name)
        if name not in self._rounded:
            scale, zero = graph.constant(f"{name}.scale", fp8_scale(maximum)), self._zero_fp8()
            narrow = graph.op("QuantizeLinear", value, scale, zero, name=f"{name}.fp8")
            self._rounded[name] = graph.op("DequantizeLinear", narrow, scale, zero, name=f"{name}.rounded"), scale
        return self._rounded[name][0]

    def _one(self) -> ir.Value:
        return self.graph.constant("int8.one", np.array(1, np.float32))

    def _zero_point(self) -> ir.Value:
        return self.graph.constant("int8.zero_point", np.array(ZERO_POINT, np.uint8))

    def _zero_fp8(self) -> ir.Value:
        import onnx_ir as ir

        return self.graph.constant("zero_fp8", np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()))
