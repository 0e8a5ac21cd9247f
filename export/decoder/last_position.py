"""The last position only: a decoder gives logits for it alone, and need not compute the others to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.export.graph.builder import shared_constant
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    import onnx_ir as ir

# Each output row of these depends on the same row of their inputs, and on constants.
POSITION_WISE = {"MatMul", "Mul", "Add", "Sigmoid", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"}
# Where the builder itself takes the last position, with `prune_lm_head`: after the last norm.
CUT = ("/lm_head/prune/Gather", "/lm_head/prune/Unsqueeze")
# Of Slice: the last of dimension 1.
BOUNDS = {"starts": -1, "ends": np.iinfo(np.int64).max, "axes": 1}


def cut_to_last_position(model: ir.Model) -> None:
    """Move the point where the builder takes the last position as far up as the graph allows, in place.

    Logits are asked for at the last position only. The last layer's attention needs keys and values of all
    positions; its output projection and MLP are then computed for one position instead of the whole prompt.
    The logits stay the same.

    Args:
        model: [batch, sequence, hidden] activations; the builder takes the last position before `lm_head`.

    Raises:
        CheckpointError: the nodes that take it are not where they should be: another version wrote the graph.
    """
    nodes = {node.name: node for node in model.graph}
    try:
        gather, unsqueeze = (nodes[name] for name in CUT)
    except KeyError as error:
        raise CheckpointError(
            f"the decoder graph has no node {error}, so the last position cannot be taken earlier. "
            "Install the version of onnxruntime-genai that hivtp's `export` extra asks for."
        ) from error
    hidden, index = gather.inputs
    assert hidden is not None, "a Gather has data"
    assert index is not None, "a Gather has indices"
    unsqueeze.outputs[0].replace_all_uses_with(hidden)
    region = _only_for_last_position(model, hidden)
    entries: list[ir.Value] = []
    for node in region:
        for value in node.inputs:
            # Weights have no positions, and values from within the region have one already.
            if value is None or value.const_value is not None or value.producer() in region or value in entries:
                continue
            entries.append(value)
        for output in node.outputs:
            output.shape = _one_position(output.shape)
    for value in entries:
        _cut(model, value, region)
    model.graph.remove([unsqueeze, gather], safe=True)
    constant = index.producer()
    if constant is not None and not index.uses():
        model.graph.remove(constant, safe=True)


def _only_for_last_position(model: ir.Model, hidden: ir.Value) -> list[ir.Node]:
    """The position-wise nodes whose outputs reach nothing but `lm_head` through other such nodes."""
    [lm_head] = [node for node, _ in hidden.uses() if node.name not in CUT]
    region = [lm_head]
    for node in reversed(model.graph):
        users = [user for output in node.outputs for user, _ in output.uses() if user.name not in CUT]
        if node.op_type in POSITION_WISE and users and all(user in region for user in users):
            region.append(node)
    return region


def _cut(model: ir.Model, value: ir.Value, region: list[ir.Node]) -> None:
    """Give the region the last row of the value, [batch, 1, hidden]."""
    import onnx_ir as ir

    bounds = [
        shared_constant(model, f"last_position/{name}", np.array([number], dtype=np.int64))
        for name, number in BOUNDS.items()
    ]
    node = ir.node("Slice", [value, *bounds], name=f"{value.name}/last_position")
    [last] = node.outputs
    last.name, last.type, last.shape = f"{value.name}/last", value.type, _one_position(value.shape)
    for user, index in value.uses():
        if user in region:
            user.replace_input_with(index, last)
    model.graph.insert_before(region[0], node)


def _one_position(shape: ir.Shape | None) -> ir.Shape | None:
    import onnx_ir as ir

    return None if shape is None or len(shape) != 3 else ir.Shape([shape[0], 1, shape[2]])
