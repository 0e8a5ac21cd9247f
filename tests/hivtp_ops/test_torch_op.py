from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivtp_ops import PRESETS, PruningSpec, ScoreError, SpecError, op, select, torch_op
from tests.hivtp_ops.brute_force import (
    CASES,
    PAPER_GRID,
    grids_and_specs,
    hard_maps,
    higher_index_wins,
    prune_batch,
    prune_tile,
    score_maps,
)

case = pytest.mark.parametrize(("grid", "spec"), CASES, ids=str)
a_few_cases = pytest.mark.parametrize(("grid", "spec"), [CASES[0], CASES[2], CASES[7]], ids=str)


@st.composite
def problems(draw):
    grid, spec = draw(grids_and_specs())
    return draw(score_maps(math.prod(grid))), grid, spec


class Pruner(torch.nn.Module):
    def __init__(self, grid, spec):
        super().__init__()
        torch_op.register()
        self.grid, self.spec = grid, spec

    def forward(self, scores):
        return torch_op.prune(scores * 1.0, self.grid, self.spec)


def assert_is_selection(outputs, maps, grid, spec):
    indices, counts = outputs
    expected = select(maps, grid, spec)
    assert indices.dtype == counts.dtype == torch.int64
    assert np.array_equal(indices.cpu().numpy(), expected.indices)
    assert np.array_equal(counts.cpu().numpy(), expected.counts)


@case
def test_eager_is_the_brute_force_on_hard_maps(grid, spec):
    maps = hard_maps(grid, spec)
    indices, counts = torch_op.prune(torch.from_numpy(maps), grid, spec)
    assert (indices.tolist(), counts.tolist()) == prune_batch(maps, grid, spec)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_eager_is_select_on_any_map(problem):
    maps, grid, spec = problem
    assert_is_selection(torch_op.prune(torch.from_numpy(maps), grid, spec), maps, grid, spec)


@a_few_cases
def test_compiled_is_select(grid, spec):
    compiled = torch.compile(Pruner(grid, spec), fullgraph=True, dynamic=True)
    maps = hard_maps(grid, spec)
    for num_tiles in (len(maps), 3):
        batch = maps[:num_tiles]
        assert_is_selection(compiled(torch.from_numpy(batch)), batch, grid, spec)


@a_few_cases
def test_exported_with_dynamic_tiles_is_select(grid, spec):
    maps = hard_maps(grid, spec)
    dynamic = ({0: torch.export.Dim("tiles")},)
    program = torch.export.export(
        Pruner(grid, spec), (torch.from_numpy(maps[:2]),), dynamic_shapes=dynamic, strict=False
    )
    called = {str(node.target) for node in program.graph.nodes}
    assert op.TORCH_NAME.replace("::", ".") + ".default" in called, "one node, not its parts"
    for num_tiles in (len(maps), 1):
        batch = maps[:num_tiles]
        assert_is_selection(program.module()(torch.from_numpy(batch)), batch, grid, spec)


def test_every_tile_of_a_batch_gives_what_it_gives_alone():
    for grid, spec in CASES:
        scores = torch.from_numpy(hard_maps(grid, spec))
        indices, counts = torch_op.prune(scores, grid, spec)
        for tile in range(len(scores)):
            alone_indices, alone_counts = torch_op.prune(scores[tile : tile + 1], grid, spec)
            assert torch.equal(alone_indices[0], indices[tile])
            assert torch.equal(alone_counts[0], counts[tile])


def test_wrong_tie_rule_is_seen():
    scores = torch.zeros(1, 576)
    for spec in PRESETS.values():
        indices, counts = torch_op.prune(scores, PAPER_GRID, spec)
        wrong, _ = prune_tile(scores[0].tolist(), PAPER_GRID, spec, sort_key=higher_index_wins)
        assert indices[0, : counts[0]].tolist() != wrong


@pytest.mark.parametrize(("grid", "spec"), [CASES[0], CASES[2]], ids=str)
def test_op_is_well_formed_for_pytorch(grid, spec):
    keep = op.NO_KEEP if spec.keep is None else spec.keep
    arguments = (torch.rand(3, 576), *grid, spec.regions, spec.global_ratio, spec.window, keep)
    torch.library.opcheck(torch_op.register(), arguments)


def test_attributes_of_the_op_are_the_arguments_of_its_schema():
    torch_op.register()
    schema = torch.ops.hivtp.hierarchical_prune.default._schema
    assert [argument.name for argument in schema.arguments] == [op.INPUT, *op.ATTRIBUTES]
    assert [output.name for output in schema.returns] == list(op.OUTPUTS)
    assert schema.name == op.TORCH_NAME


def test_registering_twice_gives_the_same_op():
    assert torch_op.register() is torch_op.register()


@case
def test_nothing_waits_for_the_device(grid, spec):
    # A meta tensor has no values, so reading one raises.
    scores = torch.empty(3, math.prod(grid), device="meta")
    keep = op.NO_KEEP if spec.keep is None else spec.keep
    indices, counts = torch_op._select(scores, *grid, spec.regions, spec.global_ratio, spec.window, keep)
    assert indices.shape == (3, spec.capacity(grid))
    assert counts.shape == (3,)


@pytest.mark.gpu
@case
def test_cuda_is_select_without_a_host_sync(grid, spec):
    maps = hard_maps(grid, spec)
    scores = torch.from_numpy(maps).cuda()
    torch_op.prune(scores, grid, spec)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = torch_op.prune(scores, grid, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_is_selection(outputs, maps, grid, spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_converted(dtype):
    scores = torch.rand(3, 35, generator=torch.manual_seed(0)).to(dtype)
    spec = PruningSpec(keep=9)
    assert_is_selection(torch_op.prune(scores, (5, 7), spec), scores.float().numpy(), (5, 7), spec)


def test_strided_scores_are_taken_as_they_are():
    scores = torch.rand(35, 3, generator=torch.manual_seed(0)).T
    assert_is_selection(torch_op.prune(scores, (5, 7), PruningSpec()), scores.numpy(), (5, 7), PruningSpec())


def test_scores_with_a_gradient_are_taken():
    scores = torch.rand(2, 35, requires_grad=True)
    indices, counts = torch_op.prune(scores, (5, 7), PruningSpec())
    assert not indices.requires_grad
    assert not counts.requires_grad


def test_outputs_made_in_inference_mode_serve_training_later():
    spec = PruningSpec(keep=13)
    with torch.inference_mode():
        torch_op.prune(torch.rand(2, 35), (5, 7), spec)
    scores = torch.rand(2, 35, requires_grad=True)
    indices, _ = torch_op.prune(scores, (5, 7), spec)
    scores.gather(1, indices).sum().backward()
    assert scores.grad.sum() == 2 * 13


def test_no_tiles_give_no_selection():
    indices, counts = torch_op.prune(torch.zeros(0, 35), (5, 7), PruningSpec(keep=4))
    assert indices.shape == (0, 4)
    assert counts.shape == (0,)


def test_nan_in_one_tile_leaves_the_others_alone():
    maps = hard_maps(PAPER_GRID, PRESETS["192"])
    scores = torch.from_numpy(maps.copy())
    scores[3, 100:200] = torch.nan
    indices, counts = torch_op.prune(scores, PAPER_GRID, PRESETS["192"])
    expected = select(maps, PAPER_GRID, PRESETS["192"])
    others = [tile for tile in range(len(maps)) if tile != 3]
    assert np.array_equal(indices.numpy()[others], expected.indices[others])
    assert indices[3].shape == (192,)
    assert ((indices[3] >= -1) & (indices[3] < 576)).all()
    assert 0 <= counts[3] <= 192


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(35), torch.zeros(1, 36), torch.zeros(1, 5, 7), torch.zeros(1, 35, dtype=torch.int64)],
)
def test_scores_of_another_shape_or_kind_are_an_error(scores):
    with pytest.raises(ScoreError, match=r"floating \[tiles, 35\]"):
        torch_op.prune(scores, (5, 7), PruningSpec())


def test_spec_that_does_not_fit_is_an_error():
    with pytest.raises(SpecError, match="window is 8"):
        torch_op.prune(torch.zeros(1, 35), (5, 7), PruningSpec(window=8))


def test_every_module_imports_with_only_the_core_installed():
    program = """
import importlib, pkgutil, sys
for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "tensorrt"):
    sys.modules[name] = None
import hivtp_ops
for module in pkgutil.walk_packages(hivtp_ops.__path__, "hivtp_ops."):
    importlib.import_module(module.name)
    print(module.name)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"hivtp_ops.torch_op", "hivtp_ops.onnx_function"} <= set(result.stdout.split())
