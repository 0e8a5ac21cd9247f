"""The rule as an ONNX function of standard ops, so that the graph runs where nothing of ours is installed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.op import ATTRIBUTES, DOMAIN, INPUT, NAME, OUTPUTS, PLUGIN_NAMESPACE, attributes
from hivtp_ops.tables import rank_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import ArrayLike

    from hivtp_ops.spec import PruningSpec

# onnx.TensorProto.INT64, spelled here since onnx is imported only where it is used.
INT64 = 7


def hierarchical_prune_node(
    importance: str,
    outputs: tuple[str, str],
    grid: tuple[int, int],
    spec: PruningSpec,
    name: str,
) -> onnx.NodeProto:
    """Make the node that calls the function, or the TensorRT plugin of the same name where there is one.

    Args:
        importance: name of the scores, [tiles, patches] float32.
        outputs: names for `kept_indices` [tiles, capacity] int64 and `kept_counts` [tiles] int64.
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.
        name: name of the node.

    Raises:
        SpecError: the spec does not fit the grid.
    """
    from onnx import helper

    return helper.make_node(
        NAME,
        [importance],
        list(outputs),
        name=name,
        domain=DOMAIN,
        # TensorRT takes a plugin before a function only where the node names the plugin's namespace.
        plugin_namespace=PLUGIN_NAMESPACE,
        **attributes(grid, spec),
    )


def hierarchical_prune_function(grid: tuple[int, int], spec: PruningSpec, opset: int = 23) -> onnx.FunctionProto:
    """Write the rule that `hivtp_ops.select` defines with standard ONNX ops, for one grid and spec.

    One input, `importance` [tiles, patches] float32, with any number of tiles; two outputs, `kept_indices`
    [tiles, capacity] int64 and `kept_counts` [tiles] int64. The attributes of the node are declared, but the
    body has their values baked in: it serves the nodes that `hierarchical_prune_node` makes of the same grid
    and spec.

    It uses only ops that TensorRT takes too; TensorRT's TopK sorts up to 3,840 patches.
    Ties rest on TopK's rule, lower index first. NaN is not looked for, and what TopK makes of it is not
    defined: whoever runs the graph checks the scores.

    Args:
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.
        opset: version of the default domain that the body is written for, 18 to 25.

    Raises:
        SpecError: the spec does not fit the grid.
    """
    from onnx import helper

    body = _Body()
    _write_body(body, grid, spec)
    return helper.make_function(
        DOMAIN,
        NAME,
        inputs=[INPUT],
        outputs=list(OUTPUTS),
        nodes=body.nodes,
        opset_imports=[helper.make_opsetid("", opset)],
        attributes=[*ATTRIBUTES, "plugin_namespace"],
        doc_string="The pruning rule of HIVTP (arXiv 2509.23663), for one grid and one spec.",
    )


def _write_body(body: _Body, grid: tuple[int, int], spec: PruningSpec) -> None:
    op, constant = body.op, body.constant
    tables = rank_tables(grid, spec)
    num_patches = math.prod(grid)
    axis_1, axis_2, patches = constant([1]), constant([2]), constant(num_patches)

    # Ranks are unique, so that no tie is left after this step.
    _, best_first = body.top_k(INPUT, num_patches, largest=1)
    raster = op("Expand", constant(np.arange(num_patches)[None]), op("Shape", best_first))
    ranks = op("ScatterElements", raster, best_first, raster, axis=1)
    can_keep = op("Greater", INPUT, constant(np.float32(-np.inf)))

    # A region keeps the ranks up to the one at its quota.
    of_region = op("Gather", ranks, constant(tables.region_members), axis=1)
    of_region = op("Where", constant(tables.is_region_pad), constant(tables.region_pad), of_region)
    best_of_region, _ = body.top_k(of_region, tables.num_sorted, largest=0)
    # The width is spelled out, since -1 cannot be worked out where there are no tiles.
    width = len(tables.region_members) * tables.num_sorted
    best_of_region = op("Reshape", best_of_region, constant([0, width]))
    last_kept = op("Gather", best_of_region, constant(tables.last_kept_at), axis=1)
    is_global = op("And", can_keep, op("Not", op("Greater", ranks, last_kept)))

    # A window keeps the best rank that is free.
    free = op("Where", op("And", can_keep, op("Not", is_global)), ranks, patches)
    of_window = op("Gather", free, constant(tables.window_members), axis=1)
    best_of_window = op("ReduceMin", of_window, axis_2, keepdims=0)
    best_of_window = op("Gather", best_of_window, constant(tables.window_ids), axis=1)
    is_local = op("Equal", ranks, best_of_window)

    # A place that holds no patch takes num_patches here, so that it sorts to the end.
    if spec.keep is None:
        kept = op("Where", op("Or", is_global, is_local), raster, patches)
    else:
        never = constant(3 * num_patches)
        stages = op("Where", can_keep, constant(2 * num_patches), never)
        stages = op("Where", is_local, patches, stages)
        stages = op("Where", is_global, constant(0), stages)
        keys, chosen = body.top_k(op("Add", stages, ranks), spec.keep, largest=0)
        kept = op("Where", op("Less", keys, never), chosen, patches)
    kept, _ = body.top_k(kept, spec.capacity(grid), largest=0)
    is_patch = op("Less", kept, patches)
    body.add("Where", [is_patch, kept, constant(-1)], [OUTPUTS[0]])
    body.add("ReduceSum", [op("Cast", is_patch, to=INT64), axis_1], [OUTPUTS[1]], keepdims=0)


class _Body:
    """The nodes of a function body, with a name for every value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node under names that are given."""
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"{NAME}.{len(self.nodes)}", **attributes))

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, and name the output."""
        output = f"{op_type}_{len(self.nodes)}"
        self.add(op_type, inputs, [output], **attributes)
        return output

    def constant(self, value: ArrayLike) -> str:
        """Add a Constant node; Python integers become int64."""
        from onnx import numpy_helper

        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def top_k(self, values: str, k: int, largest: int) -> tuple[str, str]:
        """Add a sorted TopK over the last axis, and name the values and the indices."""
        outputs = f"TopK_{len(self.nodes)}_values", f"TopK_{len(self.nodes)}_indices"
        self.add("TopK", [values, self.constant([k])], outputs, axis=-1, largest=largest)
        return outputs
