"""What quantising holds in memory; the numbers are tested with the decoder's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from hivtp.export.decoder import weight_only
from hivtp.export.decoder.w8a8 import quantize_products
from hivtp.export.decoder.weight_only import WeightOnlySettings, quantize_weights
from hivtp.export.graph.linear import INT8_PRODUCT

if TYPE_CHECKING:
    from collections.abc import Callable

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
@pytest.mark.parametrize(
    ("quantize", "op_type", "share"),
    [
        # Four bits and a float32 scale per block of 32 stay: 5 of 32 bits.
        (partial(quantize_weights, settings=WeightOnlySettings(bits=4, block_size=32)), "MatMulNBits", 0.16),
        # Eight bits stay, and a scale per channel.
        (quantize_products, INT8_PRODUCT, 0.26),
    ],
)
def test_one_weight_at_a_time_is_in_memory(quantize: Callable, op_type: str, share: float) -> None:
    reads: list[int] = []
    model = stack_of_linears(reads)
    grown: list[int] = []
    before = anonymous_bytes()
    quantize(model, on_node=lambda *_progress: grown.append(anonymous_bytes() - before))
    assert op_type in {node.op_type for node in model.graph}
    assert "MatMul" not in {node.op_type for node in model.graph}
    assert set(reads) == set(range(NUM_LAYERS))
    kept = share * WEIGHT_BYTES
    assert grown[-1] - grown[1] < (NUM_LAYERS - 2) * kept + 3 * WEIGHT_BYTES


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_rounded_in_parts_is_the_one_that_is_rounded_whole(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the head of a large vocabulary is, which no message of protobuf holds."""
    weight = np.random.default_rng(0).normal(size=(80, 1003)).astype(np.float32)

    def quantized() -> ir.Node:
        first = ir.val("input", dtype=ir.DataType.FLOAT, shape=["rows", 80])
        head = ir.val("head", const_value=ir.tensor(weight, name="head"))
        node = ir.node("MatMul", [first, head], name="lm_head")
        graph = ir.Graph([first], [node.outputs[0]], nodes=[node], initializers=[head], name="g")
        model = ir.Model(graph, ir_version=10)
        quantize_weights(model, WeightOnlySettings(bits, 32))
        [found] = model.graph
        return found

    whole = quantized()
    monkeypatch.setattr(weight_only, "MAX_PART_BYTES", weight.nbytes // 3)
    parts = quantized()
    assert {name: item.value for name, item in parts.attributes.items()} == {
        name: item.value for name, item in whole.attributes.items()
    }
    for part, expected in zip(parts.inputs[1:], whole.inputs[1:], strict=True):
        np.testing.assert_array_equal(part.const_value.numpy(), expected.const_value.numpy())
        assert part.const_value.shape == expected.const_value.shape
