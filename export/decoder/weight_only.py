"""Weight-only quantisation of a decoder, one linear layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import onnx_ir as ir

# Of a weight that ONNX Runtime's quantizer gets at once: a message of protobuf holds 2 GiB, and the head of Qwen2-7B,
# with its vocabulary of 152,000, is larger.
MAX_PART_BYTES = 2**29


@dataclass(frozen=True)
class WeightOnlySettings:
    """How weights are rounded.

    Attributes:
        bits: 4 or 8.
        block_size: weights that share a scale.
        is_symmetric: no zero points.
        accuracy_level: 4 lets the kernels of a CPU round activations to int8; 0 leaves them as they are.
    """

    bits: int
    block_size: int
    is_symmetric: bool = True
    accuracy_level: int = 4


def quantize_weights(
    model: ir.Model,
    settings: WeightOnlySettings,
    on_node: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Replace every MatMul with a constant weight by a com.microsoft MatMulNBits, in place.

    ONNX Runtime's own quantizer takes whole models, and a 7 B one in float32 needs 27 GB. Each linear layer
    is given to it as a model of its own instead, so one weight at a time is in memory in float32.

    Args:
        model: its weights may be lazy.
        settings: how to round.
        on_node: called with (layers done, all layers).
    """
    from onnx_ir.convenience import replace_nodes_and_values

    nodes = constant_products(model)
    for done, node in enumerate(nodes, start=1):
        quantized = _quantized_alone(node, settings)
        value, weight = node.inputs
        assert weight is not None, "it was found by its weight"
        initializers = list(quantized.graph.initializers.values())
        replacement = _node(quantized, [value, *initializers])
        replace_nodes_and_values(model.graph, node, [node], [replacement], node.outputs, replacement.outputs)
        for initializer in initializers:
            quantized.graph.initializers.pop(str(initializer.name))
            model.graph.register_initializer(initializer)
        drop_unused(model, weight)
        on_node(done, len(nodes))


def constant_products(model: ir.Model) -> list[ir.Node]:
    """Every MatMul with a constant weight, in order."""
    return [node for node in model.graph if node.op_type == "MatMul" and _is_constant(node.inputs[1])]


def drop_unused(model: ir.Model, weight: ir.Value) -> None:
    """Take a weight out of the model and of memory, unless something still reads it."""
    if weight.uses():
        return
    model.graph.initializers.pop(str(weight.name))
    # Now, not when the garbage collector runs: the tensor may map gigabytes of a file.
    weight.const_value = None


def _quantized_alone(node: Any, settings: WeightOnlySettings) -> ir.Model:
    """The node as a whole model, quantised; outputs are rounded independently, and so a large weight part by part."""
    import numpy as np
    import onnx_ir as ir

    weight = node.inputs[1].const_value.numpy()
    num_outputs = weight.shape[1]
    num_parts = -(-weight.nbytes // MAX_PART_BYTES)
    bounds = [num_outputs * part // num_parts for part in range(num_parts + 1)]
    parts = [_quantized_part(node, weight[:, start:stop], settings) for start, stop in pairwise(bounds) if start < stop]
    model = parts[0]
    if len(parts) > 1:
        for name, value in model.graph.initializers.items():
            arrays = [part.graph.initializers[name].const_value for part in parts]
            whole = np.concatenate([array.numpy() for array in arrays if array is not None])
            value.const_value, value.shape = ir.tensor(whole, name=value.name), ir.Shape(whole.shape)
        [quantized] = model.graph
        quantized.attributes["N"] = ir.AttrInt64("N", num_outputs)
    return model


def _quantized_part(node: Any, weight: np.ndarray[Any, Any], settings: WeightOnlySettings) -> ir.Model:
    """A product with a part [in, out] of the node's weight as a whole model, quantised."""
    import onnx_ir as ir
    from onnx import helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    name = node.inputs[1].name
    tensor = numpy_helper.from_array(weight, name)
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["input", name], ["output"], name=node.name)],
            "linear",
            [helper.make_tensor_value_info("input", tensor.data_type, None)],
            [helper.make_tensor_value_info("output", tensor.data_type, None)],
            [tensor],
        )
    )
    quantizer = MatMulNBitsQuantizer(
        proto,
        bits=settings.bits,
        block_size=settings.block_size,
        is_symmetric=settings.is_symmetric,
        accuracy_level=settings.accuracy_level,
    )
    quantizer.process()
    model: ir.Model = ir.from_proto(quantizer.model.model)
    for value in model.graph.initializers.values():
        # A message's memory lives as long as anything in it, and the float32 weight lies in the same message.
        assert value.const_value is not None, "an initializer has a value"
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def _node(quantized: ir.Model, inputs: list[Any]) -> ir.Node:
    import onnx_ir as ir

    [node] = quantized.graph
    assert list(node.inputs[1:]) == inputs[1:], "inputs and initializers have the same order"
    return ir.Node(node.domain, node.op_type, inputs, attributes=list(node.attributes.values()), name=node.name)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None
