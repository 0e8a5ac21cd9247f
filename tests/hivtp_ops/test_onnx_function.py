from __future__ import annotations

import functools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hivtp_ops import PRESETS, PruningSpec, SpecError, op, select
from hivtp_ops.onnx_function import hierarchical_prune_function, hierarchical_prune_node
from tests.hivtp_ops.brute_force import (
    CASES,
    PAPER_GRID,
    hard_maps,
    higher_index_wins,
    prune_batch,
    prune_tile,
    score_maps,
)

case = pytest.mark.parametrize(("grid", "spec"), CASES, ids=str)

# What TensorRT's parser takes, without the ops that need a plugin or give a size that depends on data.
TENSORRT_OPS = {
    "Add", "And", "Cast", "Constant", "Equal", "Expand", "Gather", "Greater", "Less", "Not", "Or",
    "ReduceMin", "ReduceSum", "Reshape", "ScatterElements", "Shape", "TopK", "Where",
}  # fmt: skip


def make_model(grid, spec, opset=23):
    node = hierarchical_prune_node("scores", ("kept", "num_kept"), grid, spec, name="prune")
    int64 = TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "prune",
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["tiles", math.prod(grid)])],
        [
            helper.make_tensor_value_info("kept", int64, ["tiles", spec.capacity(grid)]),
            helper.make_tensor_value_info("num_kept", int64, ["tiles"]),
        ],
    )
    return helper.make_model(
        graph,
        functions=[hierarchical_prune_function(grid, spec, opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(op.DOMAIN, 1)],
        ir_version=10,
    )


def make_session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def session_of(grid, spec):
    return make_session(make_model(grid, spec))


def run(maps, grid, spec):
    indices, counts = session_of(grid, spec).run(None, {"scores": maps})
    assert indices.dtype == counts.dtype == np.int64
    return indices, counts


@case
def test_function_is_the_brute_force_on_hard_maps(grid, spec):
    maps = hard_maps(grid, spec)
    indices, counts = run(maps, grid, spec)
    assert (indices.tolist(), counts.tolist()) == prune_batch(maps, grid, spec)


@case
def test_function_is_select_on_many_random_maps(grid, spec):
    rng = np.random.default_rng(7)
    shape = (40, math.prod(grid))
    for maps in (
        rng.random(shape),
        rng.integers(0, 9, shape),
        np.where(rng.random(shape) < 0.5, -np.inf, 1.0),
    ):
        scores = maps.astype(np.float32)
        indices, counts = run(scores, grid, spec)
        expected = select(scores, grid, spec)
        assert np.array_equal(indices, expected.indices)
        assert np.array_equal(counts, expected.counts)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CASES[5:]).flatmap(lambda pair: st.tuples(st.just(pair), score_maps(math.prod(pair[0])))))
def test_function_is_select_on_any_map(problem):
    (grid, spec), maps = problem
    indices, counts = run(maps, grid, spec)
    expected = select(maps, grid, spec)
    assert np.array_equal(indices, expected.indices)
    assert np.array_equal(counts, expected.counts)


@case
def test_every_tile_of_a_batch_gives_what_it_gives_alone(grid, spec):
    maps = hard_maps(grid, spec)
    indices, counts = run(maps, grid, spec)
    for tile in range(len(maps)):
        alone_indices, alone_counts = run(maps[tile : tile + 1], grid, spec)
        assert np.array_equal(alone_indices[0], indices[tile])
        assert alone_counts[0] == counts[tile]


@case
def test_no_tiles_give_no_selection(grid, spec):
    indices, counts = run(np.zeros((0, math.prod(grid)), dtype=np.float32), grid, spec)
    assert indices.shape == (0, spec.capacity(grid))
    assert counts.shape == (0,)


def test_a_grid_of_4096_patches_is_pruned_too():
    grid, spec = (64, 64), PruningSpec.preset("192", (64, 64))
    maps = hard_maps(grid, spec)
    assert np.array_equal(run(maps, grid, spec)[0], select(maps, grid, spec).indices)


def test_wrong_tie_rule_is_seen():
    scores = np.zeros((1, 576), dtype=np.float32)
    for spec in PRESETS.values():
        indices, counts = run(scores, PAPER_GRID, spec)
        wrong, _ = prune_tile(scores[0].tolist(), PAPER_GRID, spec, sort_key=higher_index_wins)
        assert indices[0, : counts[0]].tolist() != wrong


@pytest.mark.parametrize(
    ("right", "wrong"), [("ReduceMin", "ReduceMax"), ("Greater", "Less"), ("And", "Or"), ("Less", "Greater")]
)
def test_mistake_in_the_body_is_seen(right, wrong):
    spec = PRESETS["192"]
    model = make_model(PAPER_GRID, spec)
    node = next(node for node in model.functions[0].node if node.op_type == right)
    node.op_type = wrong
    maps = hard_maps(PAPER_GRID, spec)
    indices, counts = make_session(model).run(None, {"scores": maps})
    expected = select(maps, PAPER_GRID, spec)
    assert not (np.array_equal(indices, expected.indices) and np.array_equal(counts, expected.counts))


@case
def test_body_takes_only_ops_that_tensorrt_takes(grid, spec):
    function = hierarchical_prune_function(grid, spec)
    assert {node.op_type for node in function.node} <= TENSORRT_OPS
    assert all(node.domain == "" for node in function.node)
    scatters = [node for node in function.node if node.op_type == "ScatterElements"]
    assert all(attribute.name != "reduction" for node in scatters for attribute in node.attribute)


@case
def test_model_is_valid_and_its_shapes_are_static_but_for_the_tiles(grid, spec):
    model = make_model(grid, spec)
    onnx.checker.check_model(model, full_check=True)
    indices, counts = session_of(grid, spec).get_outputs()
    assert indices.shape == ["tiles", spec.capacity(grid)]
    assert counts.shape == ["tiles"]


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", PRESETS)
def test_tensorrt_parses_the_function(name):
    tensorrt = pytest.importorskip("tensorrt_rtx")
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    network = tensorrt.Builder(logger).create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    model = make_model(PAPER_GRID, PRESETS[name])
    assert parser.parse(model.SerializeToString()), [parser.get_error(i) for i in range(parser.num_errors)]
    capacity = PRESETS[name].capacity(PAPER_GRID)
    assert [tuple(network.get_output(i).shape) for i in range(2)] == [(-1, capacity), (-1,)]


@pytest.mark.parametrize("opset", [18, 21, 23, 25])
def test_function_is_valid_in_every_opset_that_it_names(opset):
    for name in ("paper", "192"):
        model = make_model(PAPER_GRID, PRESETS[name], opset)
        onnx.checker.check_model(model, full_check=True)
        maps = hard_maps(PAPER_GRID, PRESETS[name])
        indices, _ = make_session(model).run(None, {"scores": maps})
        assert np.array_equal(indices, select(maps, PAPER_GRID, PRESETS[name]).indices)


def test_names_of_values_and_nodes_are_unique():
    for spec in PRESETS.values():
        function = hierarchical_prune_function(PAPER_GRID, spec)
        values = [output for node in function.node for output in node.output]
        assert len(values) == len(set(values))
        names = [node.name for node in function.node]
        assert len(names) == len(set(names))


def test_function_has_the_signature_of_the_op():
    function = hierarchical_prune_function(PAPER_GRID, PRESETS["paper"])
    assert (function.domain, function.name) == (op.DOMAIN, op.NAME)
    assert list(function.input) == [op.INPUT]
    assert list(function.output) == list(op.OUTPUTS)
    assert list(function.attribute) == [*op.ATTRIBUTES, "plugin_namespace"]


@pytest.mark.parametrize(("name", "keep"), [("192", 192), ("paper", op.NO_KEEP)])
def test_node_carries_the_attributes_of_the_op(name, keep):
    spec = PRESETS[name]
    node = hierarchical_prune_node("scores", ("kept", "num_kept"), PAPER_GRID, spec, name="prune")
    assert (node.domain, node.op_type, node.name) == (op.DOMAIN, op.NAME, "prune")
    assert (list(node.input), list(node.output)) == (["scores"], ["kept", "num_kept"])
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {
        "rows": 24,
        "cols": 24,
        "regions": 2,
        "global_ratio": float(np.float32(spec.global_ratio)),
        "window": spec.window,
        "keep": keep,
        "plugin_namespace": op.PLUGIN_NAMESPACE.encode(),
    }


def test_spec_that_does_not_fit_is_an_error():
    spec = PruningSpec(window=8)
    with pytest.raises(SpecError, match="window is 8"):
        hierarchical_prune_function((5, 7), spec)
    with pytest.raises(SpecError, match="window is 8"):
        hierarchical_prune_node("scores", ("kept", "num_kept"), (5, 7), spec, name="prune")
