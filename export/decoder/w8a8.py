"""W8A8 for a decoder: products of int8 weights with activations that are rounded to 8 bits at run time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.decoder.rounding.smoothed_graph import smooth_vectors, smoothed_matrix
from hivtp.export.decoder.weight_only import constant_products, drop_unused
from hivtp.export.graph.builder import MICROSOFT, shared_constant
from hivtp.export.graph.linear import INT8_PRODUCT, MIN_SIZE
from hivtp.export.graph.rounding import MAX_INT8, ZERO_POINT, quantize_per_channel

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from hivtp.export.decoder.rounding.smoothing import Smoothing


def quantize_products(
    model: ir.Model,
    on_node: Callable[[int, int], None] = lambda _done, _total: None,
    smoothing: Smoothing | None = None,
    config: Any = None,
) -> None:
    """Replace every MatMul with a constant weight by a product in int8, in place.

    A weight has one scale per output channel, and an activation one per position, which is found at run time: outliers
    at one position do not make another one coarser, and a prompt gives the same in any batch.

    Source: ZeroQuant (arXiv 2206.01861), token-wise activations; its weights have several scales per channel.

    Args:
        model: float32; its weights may be lazy: one at a time is in memory in float32, and all of them in int8.
        on_node: called with (products done, all products).
        smoothing: what weights and norms are multiplied by before they are rounded.
        config: of the language model, which smoothing needs.
    """
    nodes = constant_products(model)
    if smoothing is not None:
        smooth_vectors(model, smoothing, config)
    rounder = _Rounder(model, smoothing, config)
    for done, node in enumerate(nodes, start=1):
        rounder.replace(node)
        on_node(done, len(nodes))


class _Rounder:
    def __init__(self, model: ir.Model, smoothing: Smoothing | None, config: Any) -> None:
        self._model = model
        self._smoothing = smoothing
        self._config = config
        # By the name of an activation: its rounded values and their scales; several products may share them.
        self._rounded: dict[str, tuple[ir.Value, ir.Value]] = {}

    def replace(self, node: ir.Node) -> None:
        import onnx_ir as ir
        from onnx_ir.convenience import replace_nodes_and_values

        value, weight = node.inputs
        assert value is not None, "a product has two factors"
        assert weight is not None, "it was found by its weight"
        assert weight.const_value is not None, "it was found by its weight"
        values = weight.const_value.numpy().T.astype(np.float32, copy=False)
        if self._smoothing is not None:
            values = smoothed_matrix(values, str(node.name), self._smoothing, self._config)
        matrix, scales = quantize_per_channel(values)
        rounded, value_scales = self._round(value, node)
        inputs = [
            rounded,
            shared_constant(self._model, f"{weight.name}.int8", matrix),
            shared_constant(self._model, "w8a8/one", np.array(1, np.float32)),
            shared_constant(self._model, f"{weight.name}.scales", scales),
            self._zero_point(),
        ]
        # It keeps the name of the product, from which DecoderWeights knows the weight.
        product = ir.node(INT8_PRODUCT, inputs, domain=MICROSOFT, name=node.name)
        product.outputs[0].name = f"{node.name}/unscaled"
        scaled = ir.node("Mul", [product.outputs[0], value_scales], name=f"{node.name}/scaled")
        replace_nodes_and_values(self._model.graph, node, [node], [product, scaled], node.outputs, scaled.outputs)
        drop_unused(self._model, weight)

    def _zero_point(self) -> ir.Value:
        """Rounded activations are 1 to 255 around it, since CPUs multiply uint8 by int8."""
        return shared_constant(self._model, "w8a8/zero_point", np.array(ZERO_POINT, np.uint8))

    def _round(self, value: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """A value [batch, positions, width] in uint8, and its scales [batch, positions, 1] float32."""
        import onnx_ir as ir

        name = str(value.name)
        if name in self._rounded:
            return self._rounded[name]
        nodes: list[ir.Node] = []
        constant = partial(shared_constant, self._model)

        def add(op_type: str, *inputs: ir.Value, output: str, **attributes: Any) -> ir.Value:
            node = ir.node(op_type, inputs, attributes, name=f"{name}/w8a8/{output}")
            node.outputs[0].name = node.name
            nodes.append(node)
            return node.outputs[0]

        size = add("Abs", value, output="sizes")
        size = add("ReduceMax", size, constant("w8a8/axes", np.array([-1])), output="largest", keepdims=1)
        size = add("Max", size, constant("w8a8/least", np.array(MIN_SIZE, np.float32)), output="size")
        scales = add("Mul", size, constant("w8a8/step", np.array(1 / MAX_INT8, np.float32)), output="scales")
        steps = add("Div", value, scales, output="steps")
        # Divided first, then rounded by a scale of one: an operator that rounds by a scale per position is slower.
        one, zero_point = constant("w8a8/one", np.array(1, np.float32)), self._zero_point()
        rounded = add("QuantizeLinear", steps, one, zero_point, output="uint8")
        self._model.graph.insert_before(before, nodes)
        self._rounded[name] = rounded, scales
        return rounded, scales
