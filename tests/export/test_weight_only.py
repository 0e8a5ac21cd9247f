"""What quantising holds in memory; its numbers are tested with the decoder's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from hivtp.export.weight_only import WeightOnlySettings, quantize_weights

NUM_LAYERS, WIDTH = 24, 2048
# Above what malloc keeps for itself, so that freed weights go back to the system.
WEIGHT_BYTES = WIDTH * 2 * WIDTH * 4


def stack_of_linears(reads: list[int]) -> ir.Model:
    """Linear layers one after the other, whose weights exist only while they are read."""
    value = first = ir.val("input", dtype=ir.DataType.FLOAT, shape=["rows", WIDTH])
    nodes, initializers = [], []
    for layer in range(NUM_LAYERS):

        def read(layer: int = layer) -> ir.Tensor:
            reads.append(layer)
            return ir.tensor(np.full((WIDTH, 2 * WIDTH), layer, dtype=np.float32))

        lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([WIDTH, 2 * WIDTH]), name=f"weight{layer}")
        weight = ir.val(f"weight{layer}", const_value=lazy)
        initializers.append(weight)
        nodes.append(ir.node("MatMul", [value, weight], name=f"linear{layer}"))
    graph = ir.Graph([first], [node.outputs[0] for node in nodes], nodes=nodes, initializers=initializers, name="g")
    return ir.Model(graph, ir_version=10)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_one_weight_at_a_time_is_in_memory() -> None:
    reads: list[int] = []
    model = stack_of_linears(reads)
    grown: list[int] = []
    before = anonymous_bytes()
    settings = WeightOnlySettings(bits=4, block_size=32)
    quantize_weights(model, settings, lambda *_progress: grown.append(anonymous_bytes() - before))
    assert {node.op_type for node in model.graph} == {"MatMulNBits"}
    assert set(reads) == set(range(NUM_LAYERS))
    # Four bits and a float32 scale per block of 32 stay: 5 of 32 bits, 0.16 of a weight each.
    kept = 0.16 * WEIGHT_BYTES
    assert grown[-1] - grown[1] < (NUM_LAYERS - 2) * kept + 3 * WEIGHT_BYTES
