"""What each operator of a vision graph is in PyTorch."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from hivtp.engines.torch.memory import torch_dtype
from hivtp_ops import torch_op
from hivtp_ops.op import ATTRIBUTES, DOMAIN, NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir
    import torch

    from hivtp.engines.torch.graph import Translation

MICROSOFT = "com.microsoft"


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention of [tiles, tokens, width] in heads, fused where the device has a kernel for it."""
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (
        rows.reshape(*rows.shape[:2], num_heads, -1).transpose(1, 2) for rows in (queries, keys, values)
    )
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _attend(graph: Translation, node: ir.Node) -> None:
    inputs = (graph.input(node, index) for index in range(3))
    graph.give(node, graph.call(attend, *inputs, _attribute(node, "num_heads")))


def _call(name: str, num_inputs: int) -> Callable[[Translation, ir.Node], None]:
    """An operator that is a function of torch, by its name there."""

    def translate(graph: Translation, node: ir.Node) -> None:
        import torch

        inputs = (graph.input(node, index) for index in range(num_inputs))
        graph.give(node, graph.call(getattr(torch, name), *inputs))

    return translate


def _apply(function: Callable[[Any, Any], Any]) -> Callable[[Translation, ir.Node], None]:
    """An operator of Python with two inputs, of which one may be a number."""

    def translate(graph: Translation, node: ir.Node) -> None:
        graph.give(node, graph.call(function, graph.input(node, 0), graph.input(node, 1)))

    return translate


def _cast(graph: Translation, node: ir.Node) -> None:
    import onnx_ir as ir
    import torch

    dtype = torch_dtype(ir.DataType(_attribute(node, "to")).numpy())
    graph.give(node, graph.call(torch.Tensor.to, graph.input(node, 0), dtype))


def _concat(graph: Translation, node: ir.Node) -> None:
    import torch

    if graph.is_shape(node):
        graph.set_shape(node, [length for index in range(len(node.inputs)) for length in graph.lengths(node, index)])
        return
    parts = [graph.input(node, index) for index in range(len(node.inputs))]
    graph.give(node, graph.call(torch.cat, parts, _attribute(node, "axis")))


def _expand(graph: Translation, node: ir.Node) -> None:
    import torch

    graph.give(node, graph.call(torch.broadcast_to, graph.input(node, 0), graph.lengths(node, 1)))


def _gather_rows(graph: Translation, node: ir.Node) -> None:
    import torch

    assert _attribute(node, "batch_dims") == 1, "rows are picked tile by tile"
    graph.give(node, graph.call(torch.take_along_dim, graph.input(node, 0), graph.input(node, 1), 1))


def _gelu(graph: Translation, node: ir.Node) -> None:
    from torch.nn.functional import gelu

    approximate = _attribute(node, "approximate", "none")
    graph.give(node, graph.call(gelu, graph.input(node, 0), approximate=approximate))


def _layer_norm(graph: Translation, node: ir.Node) -> None:
    from torch.nn.functional import layer_norm

    value, weight, bias = (graph.input(node, index) for index in range(3))
    assert _attribute(node, "axis", -1) == -1, "norms are over the last axis"
    shape = graph.constant(node, 1).shape
    graph.give(node, graph.call(layer_norm, value, shape, weight, bias, _attribute(node, "epsilon", 1e-5)))


def _pad(graph: Translation, node: ir.Node) -> None:
    from torch.nn.functional import pad

    widths = graph.numbers(node, 1)
    num_axes = len(widths) // 2
    # ONNX names all starts, then all ends; torch a pair for each axis, the last axis first.
    pairs = [width for axis in reversed(range(num_axes)) for width in (widths[axis], widths[num_axes + axis])]
    graph.give(node, graph.call(pad, graph.input(node, 0), pairs, value=graph.input(node, 2)))


def _prune(graph: Translation, node: ir.Node) -> None:
    torch_op.register()
    settings = (_attribute(node, name) for name in ATTRIBUTES)
    result = graph.call(torch_op.hierarchical_prune, graph.input(node, 0), *settings)
    graph.give(node, *(graph.call(operator.getitem, result, index) for index in range(len(node.outputs))))


def _reduce_mean(graph: Translation, node: ir.Node) -> None:
    import torch

    keeps = bool(_attribute(node, "keepdims", 1))
    graph.give(node, graph.call(torch.mean, graph.input(node, 0), graph.numbers(node, 1), keeps))


def _reshape(graph: Translation, node: ir.Node) -> None:
    import torch

    value = graph.input(node, 0)
    # 0 stands for the length that is there.
    lengths = [length or graph.size(value, axis) for axis, length in enumerate(graph.lengths(node, 1))]
    graph.give(node, graph.call(torch.reshape, value, lengths))


def _shape(graph: Translation, node: ir.Node) -> None:
    value, start, end = graph.input(node, 0), _attribute(node, "start"), _attribute(node, "end")
    graph.set_shape(node, [graph.size(value, axis) for axis in range(start, end)])


def _slice(graph: Translation, node: ir.Node) -> None:
    [start], [end], [axis] = (graph.numbers(node, index) for index in (1, 2, 3))
    graph.give(node, graph.call(operator.getitem, graph.input(node, 0), (slice(None),) * axis + (slice(start, end),)))


def _softmax(graph: Translation, node: ir.Node) -> None:
    import torch

    graph.give(node, graph.call(torch.softmax, graph.input(node, 0), _attribute(node, "axis", -1)))


def _transpose(graph: Translation, node: ir.Node) -> None:
    import torch

    graph.give(node, graph.call(torch.permute, graph.input(node, 0), list(_attribute(node, "perm"))))


def _unsqueeze(graph: Translation, node: ir.Node) -> None:
    import torch

    [axis] = graph.numbers(node, 1)
    graph.give(node, graph.call(torch.unsqueeze, graph.input(node, 0), axis))


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


# By domain and name; a product with a constant matrix is translated by the graph itself.
OPERATORS: Mapping[tuple[str, str], Callable[[Translation, ir.Node], None]] = {
    (MICROSOFT, "MultiHeadAttention"): _attend,
    (DOMAIN, NAME): _prune,
    ("", "Add"): _apply(operator.add),
    ("", "Cast"): _cast,
    ("", "Concat"): _concat,
    ("", "Expand"): _expand,
    ("", "GatherND"): _gather_rows,
    ("", "Gelu"): _gelu,
    ("", "LayerNormalization"): _layer_norm,
    ("", "Less"): _apply(operator.lt),
    ("", "MatMul"): _call("matmul", 2),
    ("", "Mul"): _apply(operator.mul),
    ("", "Pad"): _pad,
    ("", "ReduceMean"): _reduce_mean,
    ("", "Relu"): _call("relu", 1),
    ("", "Reshape"): _reshape,
    ("", "Shape"): _shape,
    ("", "Sigmoid"): _call("sigmoid", 1),
    ("", "Slice"): _slice,
    ("", "Softmax"): _softmax,
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Where"): _call("where", 3),
}
