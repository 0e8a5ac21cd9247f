"""A vision graph of ONNX as a `torch.fx.GraphModule`: plain PyTorch calls, which torch.compile takes whole."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hivtp.engines.torch.memory import to_tensor
from hivtp.engines.torch.operators import OPERATORS
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from torch import fx

# A length that stands in a shape: known, or computed from an input's.
Length: TypeAlias = "int | fx.Node"


def load_graph(file: Path) -> tuple[ir.Model, fx.GraphModule]:
    """Read a graph that hivtp-export wrote.

    Args:
        file: the .onnx file; its weights lie beside it.

    Returns:
        The model, and a module on the CPU: it takes the inputs in order, and gives a dict of the outputs.

    Raises:
        EngineError: the file cannot be read, or holds an operator that no floating vision graph has.
    """
    import onnx_ir as ir

    try:
        model = ir.load(file)
        return model, Translation(model).module()
    except EngineError as error:
        raise EngineError(f"torch cannot run {file}: {error}") from error
    except Exception as error:
        raise EngineError(f"torch cannot read {file}: {error}; copy or export the bundle again") from error


@dataclass(frozen=True)
class _Linear:
    """A product with a constant matrix [in, out], and the constant row that is added to it.

    Attributes:
        nodes: what it consists of, the product first.
    """

    matrix: str
    bias: str | None
    nodes: tuple[ir.Node, ...]


class Translation:
    """Adds a call for each node of an ONNX graph, in their order."""

    def __init__(self, model: ir.Model) -> None:
        import torch
        from torch import fx

        self._onnx = model.graph
        self._root = torch.nn.Module()
        self._calls = fx.Graph()
        # By ONNX name what computes a value; small numbers stand in the calls themselves.
        self._values: dict[str, Any] = {}
        # By ONNX name the lengths in a value that is a shape.
        self._shapes: dict[str, list[Length]] = {}
        self._linears = _find_linears(model.graph)

    def module(self) -> fx.GraphModule:
        """Translate the graph."""
        from torch import fx

        for value in self._onnx.inputs:
            self._values[_name(value)] = self._calls.placeholder(_name(value))
        for node in self._onnx:
            if any(_name(output) in self._values for output in node.outputs):
                continue
            if group := self._linears.get(node):
                self._add_linears(group)
                continue
            translate = OPERATORS.get((node.domain, node.op_type))
            if translate is None:
                raise EngineError(
                    f"it holds the operator {node.op_type}; an int8 graph is made for onnxruntime on the CPU, an fp8 "
                    "graph for TensorRT, and anything else that hivtp-export writes runs in torch: export it again"
                )
            translate(self, node)
        self._calls.output({_name(output): self._values[_name(output)] for output in self._onnx.outputs})
        return fx.GraphModule(self._root, self._calls)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Add a call."""
        return self._calls.call_function(function, arguments, options)

    def give(self, node: ir.Node, *results: Any) -> None:
        """Say what computes the outputs of a node."""
        for output, result in zip(node.outputs, results, strict=True):
            self._values[_name(output)] = result

    def input(self, node: ir.Node, index: int) -> Any:
        """What computes an input of a node: a call, a weight, or a number."""
        name = _name(node.inputs[index])
        if name not in self._values:
            array = self._array(name)
            self._values[name] = array.item() if array.ndim == 0 else self._weight(array)
        return self._values[name]

    def lengths(self, node: ir.Node, index: int) -> list[Length]:
        """The whole numbers that an input of a node is, which stand in the call."""
        name = _name(node.inputs[index])
        if name in self._shapes:
            return self._shapes[name]
        return [*self.numbers(node, index)]

    def numbers(self, node: ir.Node, index: int) -> list[int]:
        """The same of an input that is constant."""
        numbers: list[int] = np.atleast_1d(self.constant(node, index)).tolist()
        return numbers

    def constant(self, node: ir.Node, index: int) -> np.ndarray[Any, Any]:
        """An input of a node that is constant."""
        return self._array(_name(node.inputs[index]))

    def set_shape(self, node: ir.Node, lengths: list[Length]) -> None:
        """Say which lengths the output of a node is."""
        self._shapes[_name(node.outputs[0])] = lengths

    def is_shape(self, node: ir.Node) -> bool:
        """Whether an input of a node is a shape that depends on the graph's inputs."""
        return any(_name(value) in self._shapes for value in node.inputs)

    def size(self, value: fx.Node, axis: int) -> fx.Node:
        """A length of a value."""
        return self._calls.call_method("size", (value, axis))

    def _add_linears(self, group: Sequence[_Linear]) -> None:
        """One product for all that multiply the same value: a GPU has more to do at once, and one launch."""
        from torch.nn.functional import linear

        matrices = [self._array(item.matrix) for item in group]
        matrix = self._weight(np.concatenate(matrices, axis=1))
        bias = None
        if any(item.bias for item in group):
            rows = [
                np.zeros(part.shape[1], part.dtype) if item.bias is None else self._array(item.bias)
                for item, part in zip(group, matrices, strict=True)
            ]
            bias = self._weight(np.concatenate(rows))
        product = self.call(linear, self.input(group[0].nodes[0], 0), self._calls.call_method("t", (matrix,)), bias)
        if len(group) == 1:
            results = [product]
        else:
            parts = self._calls.call_method("split", (product, [part.shape[1] for part in matrices], -1))
            results = [self.call(operator.getitem, parts, index) for index in range(len(group))]
        for item, result in zip(group, results, strict=True):
            for part in item.nodes:
                # The product alone is read by nothing where a bias follows.
                self._values[_name(part.outputs[0])] = result

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        tensor = self._onnx.initializers[name].const_value
        assert tensor is not None, "an initializer has a value"
        return tensor.numpy()

    def _weight(self, array: np.ndarray[Any, Any]) -> fx.Node:
        # What is mapped from the file must not be written to, and is copied by this.
        name = f"weight_{len(self._root._buffers)}"
        self._root.register_buffer(name, to_tensor(array))
        return self._calls.get_attr(name)


def _find_linears(graph: ir.Graph) -> dict[ir.Node, list[_Linear]]:
    """The products with constant matrices, grouped by what they multiply, under the first node of each group."""
    groups: dict[str, list[_Linear]] = defaultdict(list)
    for node in graph:
        if node.op_type != "MatMul" or _rank(graph, node.inputs[1]) != 2:
            continue
        [product] = node.outputs
        bias: str | None = None
        nodes: tuple[ir.Node, ...] = (node,)
        users = [usage.node for usage in product.uses()]
        if len(users) == 1 and users[0].op_type == "Add" and not product.is_graph_output():
            [other] = [value for value in users[0].inputs if value is not product] or [product]
            if _rank(graph, other) == 1:
                bias, nodes = _name(other), (node, users[0])
        groups[_name(node.inputs[0])].append(_Linear(_name(node.inputs[1]), bias, nodes))
    return {group[0].nodes[0]: group for group in groups.values()}


def _rank(graph: ir.Graph, value: ir.Value | None) -> int | None:
    """The number of dimensions of a constant; None of anything else."""
    if value is None or _name(value) not in graph.initializers:
        return None
    assert value.const_value is not None, "an initializer has a value"
    return len(value.const_value.shape)


def _name(value: ir.Value | None) -> str:
    assert value is not None, "no operator of a vision graph leaves an input out"
    assert value.name is not None, "every value of a stored graph has a name"
    return value.name
