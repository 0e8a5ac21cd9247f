"""The activations of vision towers and projectors as operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    import onnx_ir as ir

    from hivtp.export.graph.builder import GraphBuilder


def activation(graph: GraphBuilder, kind: str, value: ir.Value, name: str) -> ir.Value:
    """One of the activations that vision towers and LLaVA projectors use.

    Raises:
        CheckpointError: for any other.
    """
    if kind == "quick_gelu":
        gate = graph.op("Mul", value, graph.constant("quick_gelu_scale", 1.702), name=f"{name}.scaled")
        return graph.op("Mul", value, graph.op("Sigmoid", gate, name=f"{name}.gate"), name=name)
    approximate = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}.get(kind)
    if approximate is not None:
        return graph.op("Gelu", value, name=name, approximate=approximate)
    if kind == "relu":
        return graph.op("Relu", value, name=name)
    raise CheckpointError(f"activation {kind!r} is not supported; supported are quick_gelu, gelu and relu")
