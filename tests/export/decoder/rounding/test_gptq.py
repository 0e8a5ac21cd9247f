"""Weights of 4 bits: GPTQ against rounding to the nearest, and what ONNX Runtime makes of the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hivtp.engines.onnxruntime import open_session
from hivtp.export.decoder.rounding import gptq
from hivtp.export.decoder.rounding import inputs as inputs_module
from hivtp.export.decoder.rounding.gptq import inverse_factor, round_weights
from hivtp.export.decoder.rounding.grid import best_grid, stacked
from hivtp.export.decoder.rounding.inputs import LinearInputs
from hivtp.export.decoder.weight_only import WeightOnlySettings, quantize_weights
from hivtp.export.verify.operations.decoder_weights import dequantize

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.decoder.rounding.grid import RoundedWeight

NUM_INPUTS, NUM_OUTPUTS = 80, 48


def correlated_inputs(num: int, seed: int) -> torch.Tensor:
    """[num, NUM_INPUTS] that lie near a plane of 12 dimensions, some channels larger than others."""
    mixing = torch.randn(12, NUM_INPUTS, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 12, generator=generator) @ mixing
    inputs += 0.05 * torch.randn(num, NUM_INPUTS, generator=generator)
    inputs[:, ::9] *= 6
    return inputs


def weight_of(seed: int = 3) -> torch.Tensor:
    return torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=torch.Generator().manual_seed(seed))


def moments_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def to_the_nearest(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    scales, zeros = best_grid(weight, torch.ones(weight.shape[1]), block_size)
    scales, zeros = (part.repeat_interleave(block_size, 1)[:, : weight.shape[1]] for part in (scales, zeros))
    return ((weight / scales + zeros).round().clamp(0, 15) - zeros) * scales


def node_with(weight: torch.Tensor, rounded: RoundedWeight, block_size: int) -> tuple[ir.Node, ir.Model]:
    first = ir.val("input", dtype=ir.DataType.FLOAT, shape=["rows", weight.shape[1]])
    matrix = ir.val("m", const_value=ir.tensor(weight.T.contiguous().numpy(), name="m"), shape=weight.T.shape)
    matrix.dtype = ir.DataType.FLOAT
    product = ir.node("MatMul", [first, matrix], name="product")
    product.outputs[0].name, product.outputs[0].dtype = "output", ir.DataType.FLOAT
    graph = ir.Graph([first], product.outputs, nodes=[product], initializers=[matrix], name="g")
    graph.opset_imports.update({"": 21, "com.microsoft": 1})
    model = ir.Model(graph, ir_version=10)
    settings = WeightOnlySettings(4, block_size, accuracy_level=0)
    quantize_weights(model, settings, rounded={"product": rounded})
    [node] = model.graph
    return node, model


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_outputs_on_other_inputs_are_nearer_than_with_rounding_to_the_nearest(block_size: int) -> None:
    weight, seen, others = weight_of(), correlated_inputs(512, seed=1), correlated_inputs(256, seed=2)
    [(_, rounded)] = round_weights([weight], [moments_of(seen)], block_size)
    expected = others @ weight.T
    error, plain = (
        float((others @ found.T - expected).norm() / expected.norm())
        for found in (rounded, to_the_nearest(weight, block_size))
    )
    assert error < 0.5 * plain
    # The weights themselves move further: that is what the method trades.
    assert (rounded - weight).norm() > (to_the_nearest(weight, block_size) - weight).norm()


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_onnx_runtime_multiplies_by_the_values_that_were_rounded(tmp_path: Path, block_size: int) -> None:
    """80 inputs are 5, 3 and 2 blocks, the last ones cut short, and odd numbers of zero points in bytes of two."""
    weight, inputs = weight_of(), correlated_inputs(64, seed=4)
    [(rounded, values)] = round_weights([weight], [moments_of(inputs)], block_size)
    node, model = node_with(weight, rounded, block_size)
    np.testing.assert_allclose(dequantize(node), values.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(dequantize(node, slice(5, 9)), values[5:9].numpy(), rtol=0, atol=1e-6)
    ir.save(model, tmp_path / "product.onnx")
    [found] = open_session(tmp_path / "product.onnx").run(None, {"input": inputs.numpy()})
    np.testing.assert_allclose(found, (inputs @ values.T).numpy(), rtol=1e-4, atol=1e-3)


def test_weights_of_the_same_inputs_are_rounded_as_each_alone() -> None:
    weights, moments = [weight_of(1), weight_of(2)], moments_of(correlated_inputs(200, seed=5))
    together = round_weights(weights, [moments.clone()], 32)
    alone = [round_weights([weight], [moments.clone()], 32)[0] for weight in weights]
    whole, _ = round_weights([torch.cat(weights)], [moments.clone()], 32)[0]
    for (first, first_values), (second, second_values) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(first.packed, second.packed)
        assert torch.equal(first_values, second_values)
    joined = stacked([found for found, _ in together])
    for name in ("packed", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_inputs_in_parts_are_rounded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "MAX_TOGETHER", 32)
    weight, seen, others = weight_of(), correlated_inputs(512, seed=1), correlated_inputs(256, seed=2)
    linear = torch.nn.Linear(NUM_INPUTS, NUM_OUTPUTS, bias=False)
    with LinearInputs({"linear": linear}, has_moments=True) as watched:
        linear(seen[:200])
        linear(seen[200:])
    parts = watched.take_moments("linear")
    assert [len(part) for part in parts] == [32, 32, 16]
    [(packed, values)] = round_weights([weight], [part.clone() for part in parts], 16)
    for place, part in enumerate(parts):
        split = weight[:, place * 32 : place * 32 + len(part)].contiguous()
        [(_, alone)] = round_weights([split], [part], 16)
        assert torch.equal(values[:, place * 32 : place * 32 + len(part)], alone)
    assert packed.scales.shape == (NUM_OUTPUTS, 5)
    expected = others @ weight.T
    error, plain = ((others @ found.T - expected).norm() for found in (values, to_the_nearest(weight, 16)))
    assert error < plain


@pytest.mark.parametrize("small", [512, 16])
def test_the_factor_is_that_of_the_inverse(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(gptq, "SMALL_TRIANGLE", small)
    moments = moments_of(correlated_inputs(300, seed=6))
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(NUM_INPUTS)
    factor = inverse_factor(moments.clone(), damping=0.1)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(NUM_INPUTS), rtol=0, atol=1e-3)


def test_inputs_that_are_always_zero_and_weights_of_zero_do_no_harm() -> None:
    inputs, weight = correlated_inputs(100, seed=8), weight_of()
    inputs[:, 10:50] = 0
    weight[4] = 0
    [(rounded, values)] = round_weights([weight], [moments_of(inputs)], 32)
    assert values.isfinite().all()
    assert (values[4] == 0).all()
    assert np.isfinite(rounded.scales).all()
    [(_, silent)] = round_weights([weight], [torch.zeros(NUM_INPUTS, NUM_INPUTS)], 32)
    assert float((silent - weight).norm() / weight.norm()) < 0.2
