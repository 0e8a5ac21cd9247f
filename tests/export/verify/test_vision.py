"""Vision graphs against PyTorch: right ones pass, at every size and depth; each planted fault is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima, first_fp8_layer
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.verify import vision
from hivtp.export.verify.samples import sample_patch_mask, sample_pixels
from hivtp.export.verify.vision import verify_vision
from hivtp_ops import PruningSpec
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PRECISIONS = ("fp32", "fp16", "fp8", "int8")
SPEC = PruningSpec(first_layer=1, num_layers=2, keep=20).resolve(6)


def write(checkpoint: Checkpoint, folder: Path, precision: str, spec: PruningSpec | None, kind: str = "vision") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    side = checkpoint.config.vision_config.image_size
    runs = [sample_pixels(1, side)]
    maxima = None
    if precision in ("fp8", "int8"):
        first = first_fp8_layer(spec, VisionShape.of(checkpoint.config)) if precision == "fp8" else 0
        maxima = activation_maxima(checkpoint, first, runs, folder)
    save_model(build_vision_graph(checkpoint, spec, precision, kind, maxima), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module", params=PRECISIONS)
def graph(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A right graph of each precision, and its precision."""
    return write(checkpoint, tmp_path_factory.mktemp("vision"), request.param, SPEC), request.param


@pytest.fixture
def model(graph: Any, tmp_path: Path) -> Any:
    """A copy of it to plant faults in: the graph, where to save it, and its precision."""
    file, precision = graph
    copy = shutil.copytree(file.parent, tmp_path / "copy") / file.name
    return onnx.load(copy), copy, precision


def stored(graph: onnx.GraphProto, name: str) -> list[onnx.TensorProto]:
    """What a graph holds of one weight, whatever the precision."""
    names = {f"{name}{suffix}" for suffix in (".T", ".int8", ".fp8", ".blocks", ".scale")}
    found = [item for item in graph.initializer if item.name in names]
    assert found, name
    return found


def put(tensor: onnx.TensorProto, other: onnx.TensorProto) -> None:
    name = tensor.name
    tensor.CopyFrom(other)
    tensor.name = name


def change(graph: onnx.GraphProto, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    [tensor] = [item for item in graph.initializer if item.name == name]
    values = numpy_helper.to_array(tensor)
    changed = np.ascontiguousarray(function(values.astype(np.float32))).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def node_of(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    [node] = [node for node in graph.node if output in node.output]
    return node


LAYER = "vision.encoder.layers"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def layer_of_another(graph: onnx.GraphProto) -> None:
    """Layer 3 has the weights of layer 4, both after the scores."""
    for part in LINEARS:
        others = stored(graph, f"{LAYER}.4.{part}.weight")
        for first, second in zip(stored(graph, f"{LAYER}.3.{part}.weight"), others, strict=True):
            put(first, second)


def scoring_layer_of_another(graph: onnx.GraphProto) -> None:
    for part in ("q_proj", "k_proj"):
        pairs = zip(
            stored(graph, f"{LAYER}.1.self_attn.{part}.weight"),
            stored(graph, f"{LAYER}.2.self_attn.{part}.weight"),
            strict=True,
        )
        for first, second in pairs:
            put(first, second)


def heads_swapped(graph: onnx.GraphProto) -> None:
    """The outputs of two of three heads change places behind the attention."""
    order = np.concatenate([np.arange(16, 32), np.arange(16), np.arange(32, 48)])
    for tensor in stored(graph, f"{LAYER}.3.self_attn.v_proj.weight"):
        if tensor.dims:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[..., order]), tensor.name))


def query_heads_swapped(graph: onnx.GraphProto) -> None:
    order = np.concatenate([np.arange(16, 32), np.arange(16), np.arange(32, 48)])
    for tensor in stored(graph, f"{LAYER}.3.self_attn.q_proj.weight"):
        if tensor.dims:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[..., order]), tensor.name))


def norm_of_another_epsilon(graph: onnx.GraphProto) -> None:
    names = ("layers.0.norm1", "layers.0.norm1.float32")
    [node] = [node for node in graph.node if node.op_type == "LayerNormalization" and node.name in names]
    [epsilon] = [item for item in node.attribute if item.name == "epsilon"]
    epsilon.f = 0.1


def query_bias_dropped(graph: onnx.GraphProto) -> None:
    change(graph, f"{LAYER}.3.self_attn.q_proj.bias", np.zeros_like)


def values_bias_not_moved(graph: onnx.GraphProto) -> None:
    change(graph, f"{LAYER}.3.self_attn.out_proj.bias_with_values", lambda values: values * 0.9)


def mlp_bias_dropped(graph: onnx.GraphProto) -> None:
    change(graph, f"{LAYER}.4.mlp.fc1.bias", np.zeros_like)


def projector_bias_dropped(graph: onnx.GraphProto) -> None:
    change(graph, "projector.linear_1.bias", np.zeros_like)


def position_shifted(graph: onnx.GraphProto) -> None:
    change(graph, "vision.embeddings.position_embedding.weight", lambda values: np.roll(values, 1, axis=0))


def residual_of_another_layer(graph: onnx.GraphProto) -> None:
    node_of(graph, "layers.3.attended").input[0] = "layers.1.output"


def attention_scaled(graph: onnx.GraphProto) -> None:
    change(graph, "attention_scale", lambda values: values * 0.9)


def one_scoring_layer_forgotten(graph: onnx.GraphProto) -> None:
    """The scores are twice those of the first of two layers."""
    node = node_of(graph, "importance.sum1")
    node.input[1] = node.input[0]


def class_token_kept(graph: onnx.GraphProto) -> None:
    """Scores begin with the CLS token's, and end one patch early."""
    change(graph, "after_cls", np.zeros_like)
    change(graph, "to_end", lambda values: np.full_like(values, 64))


def rows_off_by_one(graph: onnx.GraphProto) -> None:
    """The kept features are those of the patches before."""
    change(graph, "cls_offset", np.zeros_like)


FAULTS = (
    layer_of_another,
    scoring_layer_of_another,
    heads_swapped,
    query_heads_swapped,
    norm_of_another_epsilon,
    query_bias_dropped,
    values_bias_not_moved,
    mlp_bias_dropped,
    projector_bias_dropped,
    position_shifted,
    residual_of_another_layer,
    attention_scaled,
    one_scoring_layer_forgotten,
    class_token_kept,
    rows_off_by_one,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_refused(checkpoint: Checkpoint, model: Any, fault: Callable[..., None]) -> None:
    proto, file, precision = model
    fault(proto.graph)
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match=f"the {precision} vision graph differs from PyTorch"):
        verify_vision(checkpoint, SPEC, file, precision, "vision")
    assert not list(file.parent.glob("checked-*"))


def test_a_right_graph_passes_and_the_report_says_how_close_it_is(checkpoint: Checkpoint, graph: Any) -> None:
    file, precision = graph
    report = verify_vision(checkpoint, SPEC, file, precision, "vision")
    assert 0.8 <= report["kept_jaccard"] <= 1
    assert 0 < report["median_row_error"] < 2 * report["relative_error"]
    errors = report["layers"]["errors"]
    assert ("rounding" in errors) == ("weights" in errors) == (precision in ("fp8", "int8"))
    assert errors["operation"] < (1e-5 if precision in ("fp32", "int8") else 5e-3)
    assert errors["product"] < (1e-5 if precision in ("fp32", "int8") else 2e-3)
    # They round what they multiply within the kernel.
    assert errors.get("blocks", 0) < 5e-2
    assert ("blocks" in errors) == (precision == "int8")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (None, "vision"),
        (SPEC, "encoder"),
        (PruningSpec(first_layer=3, num_layers=1), "vision"),
        (PruningSpec(first_layer=4, num_layers=2), "vision"),
    ],
)
def test_every_form_of_the_graph_passes(
    checkpoint: Checkpoint, tmp_path: Path, spec: PruningSpec | None, kind: str, precision: str
) -> None:
    spec = None if spec is None else spec.resolve(6)
    if precision == "fp8" and spec is not None and spec.scoring_layers.stop > 4:
        pytest.skip("nothing is left for fp8")
    report = verify_vision(checkpoint, spec, write(checkpoint, tmp_path, precision, spec, kind), precision, kind)
    assert (report["kept_jaccard"] is None) == (spec is None or kind == "encoder")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {"family": "llava_next"},
        {"tower": "siglip"},
        {"tower": "siglip", "family": "llava_next", "vision_feature_layer": -2},
        {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
        {"vision": {"num_hidden_layers": 32}, "seed": 3},
        {"vision": {"hidden_size": 128, "num_attention_heads": 8, "image_size": 112, "patch_size": 14}, "seed": 4},
        {"vision": {"hidden_act": "gelu", "num_hidden_layers": 3}, "dtype": "float16"},
    ],
)
def test_right_graphs_of_other_shapes_pass(tmp_path: Path, shape: dict[str, Any], precision: str) -> None:
    opened = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", **shape))
    config = opened.config.vision_config
    spec = PruningSpec(first_layer=0, num_layers=1) if config.num_hidden_layers == 3 else PruningSpec()
    spec = spec.resolve(config.num_hidden_layers)
    report = verify_vision(opened, spec, write(opened, tmp_path / "graph", precision, spec), precision, "vision")
    assert report["kept_jaccard"] >= 0.8


def patch_bias_dropped(graph: onnx.GraphProto) -> None:
    change(graph, "vision.embeddings.patch_embedding.bias", np.zeros_like)


def patches_shifted(graph: onnx.GraphProto) -> None:
    """The patches begin 4 px further to the right and below."""
    change(graph, "first", lambda values: values + 4)
    change(graph, "seen", lambda values: values + 4)


def first_patch_for_all(graph: onnx.GraphProto) -> None:
    change(graph, "first_row", lambda values: values + 63)


@pytest.mark.parametrize("fault", [patch_bias_dropped, patches_shifted, first_patch_for_all])
def test_each_fault_planted_into_siglip_is_refused(tmp_path: Path, fault: Callable[..., None]) -> None:
    opened = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", tower="siglip"))
    file = write(opened, tmp_path / "graph", "fp32", SPEC)
    proto = onnx.load(file)
    fault(proto.graph)
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match="the fp32 vision graph differs from PyTorch"):
        verify_vision(opened, SPEC, file, "fp32", "vision")


def test_attention_that_tells_nothing_apart_passes_in_float32(tmp_path: Path) -> None:
    """Scores are then equal to the last digits, which are not compared with themselves."""
    folder = make_checkpoint(tmp_path / "checkpoint", vision={"initializer_factor": 1e-3})
    opened = Checkpoint.open(folder)
    spec = PruningSpec.preset("192", (8, 8)).resolve(6)
    report = verify_vision(opened, None, write(opened, tmp_path / "a", "fp32", None), "fp32", "vision")
    assert report["importance_error"] is None
    report = verify_vision(opened, spec, write(opened, tmp_path / "b", "fp32", spec, "encoder"), "fp32", "encoder")
    assert report["importance_error"] < 1e-3


def test_patches_of_another_rule_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = replace(SPEC, window=4)
    file = write(checkpoint, tmp_path, "int8", other)
    with pytest.raises(VerificationError, match="keeps other patches than the rule selects from its own scores"):
        verify_vision(checkpoint, SPEC, file, "int8", "vision")


def test_nan_is_refused(checkpoint: Checkpoint, model: Any) -> None:
    proto, file, precision = model
    change(proto.graph, "projector.linear_2.bias", lambda values: values * np.nan)
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match="error is nan"):
        verify_vision(checkpoint, SPEC, file, precision, "vision")


@pytest.mark.parametrize(
    ("strict", "message"),
    [
        (vision.VisionTolerance(1e-9, 0, 1), "relative error is .*, allowed is at most 1e-09"),
        (vision.VisionTolerance(1, 0, 1e-9), "importance error is .*, allowed is at most 1e-09"),
        (vision.VisionTolerance(1, 1.01, 1), r"kept-token agreement is .*, allowed is at least 1\.01"),
    ],
)
def test_rounding_that_costs_too_much_as_a_whole_is_refused(
    checkpoint: Checkpoint, graph: Any, monkeypatch: pytest.MonkeyPatch, strict: vision.VisionTolerance, message: str
) -> None:
    file, precision = graph
    monkeypatch.setattr(vision, "VISION_TOLERANCES", dict.fromkeys(PRECISIONS, strict))
    with pytest.raises(VerificationError, match=message):
        verify_vision(checkpoint, SPEC, file, precision, "vision")


def test_few_large_rows_do_not_hide_the_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = write(checkpoint, tmp_path, "int8", None)
    outputs = vision.create_engine("onnxruntime", file).run({"pixel_values": sample_pixels(2, 64)})
    expected = outputs["image_embeds"].copy()
    expected[:, 0] *= 1e4
    found = expected * np.where(np.arange(expected.shape[1]) == 0, 1, 1.5)[None, :, None]
    whole, median = vision._errors(found.astype(np.float32), expected)
    assert whole < 0.1
    assert median == pytest.approx(0.5)


def test_sample_pixels_are_the_same_at_every_call_and_have_no_ties() -> None:
    first, second = sample_pixels(2, 64), sample_pixels(2, 64)
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float32
    assert not np.array_equal(first[0], first[1])
    patches = first.reshape(2, 3, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(128, -1)
    assert len(np.unique(patches, axis=0)) == 128
    assert sample_patch_mask(3, (8, 8)).sum(axis=1).tolist() == [64, 32, 32]


def test_a_capacity_of_all_patches_is_not_taken_for_all_of_them_in_order(tmp_path: Path) -> None:
    """52 to 64 of 64 patches: rows without a patch read the first."""
    opened = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", tower="siglip"))
    spec = PruningSpec(global_ratio=0.75).resolve(6)
    assert spec.capacity((8, 8)) == 64
    report = verify_vision(opened, spec, write(opened, tmp_path / "graph", "fp32", spec), "fp32", "vision")
    assert report["kept_jaccard"] == 1
