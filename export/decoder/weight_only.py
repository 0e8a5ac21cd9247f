"""Weight-only quantisation of a decoder, one linear layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hivtp.export.graph.builder import MICROSOFT, shared_constant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import onnx_ir as ir

    from hivtp.export.decoder.rounding.grid import RoundedWeight

# Of a weight that ONNX Runtime's quantizer gets at once: a message of protobuf holds 2 GiB, and the head of Qwen2-7B,
# with its vocabulary of 152,000, is larger.
MAX_PART_BYTES = 2**29
# Of a head beside weights that a text calibrated: its error reaches the logits whole, and it is read once per token.
HEAD_BITS = 8


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
    rounded: Mapping[str, RoundedWeight] | None = None,
) -> None:
    """Replace every MatMul with a constant weight by a com.microsoft MatMulNBits, in place.

    ONNX Runtime's own quantizer takes whole models, and a 7 B one in float32 needs 27 GB. Each linear layer
    is given to it as a model of its own instead, so one weight at a time is in memory in float32.

    Args:
        model: its weights may be lazy.
        settings: how to round.
        on_node: called with (layers done, all layers).
        rounded: weights that are rounded already, in blocks of that size, by the names of their nodes. The others,
            which is the head, are then rounded to HEAD_BITS.
    """
    from onnx_ir.convenience import replace_nodes_and_values

    nodes = constant_products(model)
    for done, node in enumerate(nodes, start=1):
        weight = node.inputs[1]
        assert weight is not None, "it was found by its weight"
        if not rounded:
            replacement = _rounded_to_nearest(model, node, settings)
        elif str(node.name) in rounded:
            replacement = _rounded_already(model, node, rounded[str(node.name)], settings)
        else:
            replacement = _rounded_to_nearest(model, node, replace(settings, bits=HEAD_BITS))
        replace_nodes_and_values(model.graph, node, [node], [replacement], node.outputs, replacement.outputs)
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


def _rounded_to_nearest(model: ir.Model, node: ir.Node, settings: WeightOnlySettings) -> ir.Node:
    quantized = _quantized_alone(node, settings)
    initializers = list(quantized.graph.initializers.values())
    replacement = _node(quantized, [node.inputs[0], *initializers])
    for initializer in initializers:
        quantized.graph.initializers.pop(str(initializer.name))
        model.graph.register_initializer(initializer)
    return replacement


def _rounded_already(model: ir.Model, node: ir.Node, rounded: RoundedWeight, settings: WeightOnlySettings) -> ir.Node:
    import onnx_ir as ir

    value, weight = node.inputs
    assert weight is not None, "it was found by its weight"
    assert weight.shape is not None, "a weight has a shape"
    assert weight.dtype is not None, "a weight has a type"
    # Named, shaped and packed as ONNX Runtime's quantizer does.
    parts = {
        "Q4": rounded.packed,
        "scales": rounded.scales.ravel().astype(weight.dtype.numpy(), copy=False),
        "zero_points": rounded.zero_points.ravel(),
    }
    num_inputs, num_outputs = weight.shape
    attributes = {
        "K": num_inputs,
        "N": num_outputs,
        "bits": settings.bits,
        "block_size": settings.block_size,
        **({"accuracy_level": settings.accuracy_level} if settings.accuracy_level else {}),
    }
    inputs = [value, *(shared_constant(model, f"{weight.name}_{name}", array) for name, array in parts.items())]
    return ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)


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
