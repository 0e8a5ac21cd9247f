"""The vision graphs against the Hugging Face model, and what the graphs may and may not hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines import create_engine
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima
from hivtp.export.graph.rounding import ZERO_POINT, quantize_in_blocks, quantize_per_channel
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.smoothing import SmoothedWeights
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.verify.checks import jaccard, relative_error
from hivtp.export.verify.samples import sample_pixels
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class Reference:
    """The whole Hugging Face model with eager attention: features, embeddings, scores."""

    def __init__(self, folder: Path, pixel_values: NDArray[np.float32], spec: PruningSpec | None) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model = model.eval().model
        pixels = torch.from_numpy(pixel_values)
        layer = model.config.vision_feature_layer
        with torch.inference_mode():
            tower = model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
            features = tower.hidden_states[layer]
            num_class_tokens = int(hasattr(model.vision_tower.embeddings, "class_embedding"))
            if model.config.vision_feature_select_strategy == "default":
                features = features[:, num_class_tokens:]
            self.features = features.numpy()
            # transformers takes layer 0 for "not given" and fails.
            embeds = model.multi_modal_projector(features) if layer == 0 else self._image_features(model, pixels)
            self.embeds = embeds.numpy()
        if spec is not None:
            layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)
            self.attention = torch.stack(tower.attentions[layers], dim=1).numpy()
            self.importance = self.attention.mean(axis=(1, 2, 3))[:, num_class_tokens:]

    @staticmethod
    def _image_features(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(model.get_image_features(pixels).pooler_output))


def write(folder: Path, file: Path, spec: PruningSpec | None, precision: str = "fp32", kind: str = "vision") -> Path:
    save_model(build_vision_graph(Checkpoint.open(folder), spec, precision, kind), file)
    return file


def run(file: Path, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    return create_engine("onnxruntime", file).run({"pixel_values": pixel_values})


def check_pruned(folder: Path, tmp_path: Path, spec: PruningSpec, num_tiles: int = 3) -> None:
    shape = VisionShape.of(Checkpoint.open(folder).config)
    spec = spec.resolve(shape.num_layers)
    pixels = sample_pixels(num_tiles, shape.image_size)
    reference = Reference(folder, pixels, spec)
    outputs = run(write(folder, tmp_path / "model.onnx", spec), pixels)
    expected = select(reference.importance, shape.grid, spec)
    assert np.abs(outputs["importance"] - reference.importance).max() <= 1e-6
    np.testing.assert_array_equal(outputs["kept_indices"], expected.indices)
    np.testing.assert_array_equal(outputs["kept_counts"], expected.counts)
    prefix = shape.num_prefix_tokens
    for tile, count in enumerate(expected.counts):
        rows = np.concatenate([np.arange(prefix), expected.indices[tile, :count] + prefix])
        found = outputs["image_embeds"][tile]
        assert relative_error(found[: prefix + count], reference.embeds[tile, rows]) <= 1e-4
        assert not found[prefix + count :].any()


@pytest.mark.parametrize("preset", ["paper", "288", "192", "128", "64"])
def test_every_preset_equals_hugging_face(tiny_checkpoint: Path, tmp_path: Path, preset: str) -> None:
    check_pruned(tiny_checkpoint, tmp_path, PruningSpec.preset(preset, (8, 8)))


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("feature_layer", [-1, -2, -3, -7, 0, 1, 4, 6])
def test_any_feature_layer_and_strategy_equals_hugging_face(tmp_path: Path, feature_layer: int, strategy: str) -> None:
    folder = make_checkpoint(
        tmp_path / "checkpoint", vision_feature_layer=feature_layer, vision_feature_select_strategy=strategy
    )
    check_pruned(folder, tmp_path, PruningSpec(first_layer=2, num_layers=2))
    pixels = sample_pixels(2, 64)
    outputs = run(write(folder, tmp_path / "unpruned.onnx", None), pixels)
    assert relative_error(outputs["image_embeds"], Reference(folder, pixels, None).embeds) <= 1e-4


@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_size": 32, "num_attention_heads": 2, "image_size": 60, "patch_size": 12, "num_hidden_layers": 4},
        {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "gelu", "num_hidden_layers": 2},
        {"layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh", "image_size": 112, "patch_size": 16},
    ],
)
def test_any_tower_size_equals_hugging_face(tmp_path: Path, vision: dict[str, Any]) -> None:
    check_pruned(make_checkpoint(tmp_path / "checkpoint", vision=vision), tmp_path, PruningSpec(window=3))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 x 8 patches that do not reach to the end of the image, no class token."""
    return make_checkpoint(tmp_path_factory.mktemp("siglip") / "checkpoint", tower="siglip")


@pytest.mark.parametrize("preset", ["paper", "288", "192", "128", "64"])
def test_every_preset_on_siglip_equals_hugging_face(siglip: Path, tmp_path: Path, preset: str) -> None:
    check_pruned(siglip, tmp_path, PruningSpec.preset(preset, (8, 8)))


@pytest.mark.parametrize("feature_layer", [-1, -2, -7, 0, 4])
def test_any_feature_layer_of_siglip_equals_hugging_face(tmp_path: Path, feature_layer: int) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", tower="siglip", vision_feature_layer=feature_layer)
    check_pruned(folder, tmp_path, PruningSpec(first_layer=2, num_layers=2))
    pixels = sample_pixels(2, 68)
    outputs = run(write(folder, tmp_path / "unpruned.onnx", None), pixels)
    assert relative_error(outputs["image_embeds"], Reference(folder, pixels, None).embeds) <= 1e-4


def test_the_shape_of_published_siglip_towers_equals_hugging_face(tmp_path: Path) -> None:
    """384 px in patches of 14: 27 x 27, and 6 px that no patch sees; presets keep their share of 729."""
    folder = make_checkpoint(
        tmp_path / "checkpoint",
        tower="siglip",
        vision={"image_size": 384, "patch_size": 14, "num_hidden_layers": 3, "vision_use_head": True},
    )
    shape = VisionShape.of(Checkpoint.open(folder).config)
    assert (shape.grid, shape.num_tokens, shape.num_prefix_tokens) == ((27, 27), 729, 0)
    spec = PruningSpec.preset("192", shape.grid)
    assert spec.keep == 243
    check_pruned(folder, tmp_path, replace(spec, first_layer=0, num_layers=1), num_tiles=2)


def test_siglips_last_layer_runs_for_the_kept_patches_alone(siglip: Path, tmp_path: Path) -> None:
    spec = PruningSpec.preset("192", (8, 8)).resolve(6)
    file = write(siglip, tmp_path / "model.onnx", spec)
    model = load(file)
    watched = ["layers.5.fc1", "layers.5.attention.queries", "layers.5.attention.keys.matmul"]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in watched)
    onnx.save(model, file)
    outputs = run(file, sample_pixels(1, 68))
    assert [outputs[name].shape[1] for name in watched] == [21, 21, 64]


def test_the_encoder_graph_of_siglip_has_no_class_token(siglip: Path, tmp_path: Path) -> None:
    spec = PruningSpec(first_layer=1, num_layers=3).resolve(6)
    pixels = sample_pixels(2, 68)
    outputs = run(write(siglip, tmp_path / "encoder.onnx", spec, kind="encoder"), pixels)
    reference = Reference(siglip, pixels, spec)
    assert outputs["attention"].shape == (2, 3, 3, 64, 64)
    assert relative_error(outputs["features"], reference.features) <= 1e-4
    assert np.abs(outputs["attention"] - reference.attention).max() <= 1e-5
    assert np.abs(outputs["importance"] - reference.importance).max() <= 1e-6


def test_scoring_layers_beyond_the_features_still_score(tiny_checkpoint: Path, tmp_path: Path) -> None:
    check_pruned(tiny_checkpoint, tmp_path, PruningSpec(first_layer=4, num_layers=2))


def test_a_projector_without_bias_equals_hugging_face(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", multimodal_projector_bias=False, projector_hidden_act="relu")
    check_pruned(folder, tmp_path, PruningSpec())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, dtype: str) -> None:
    folder = make_checkpoint(tmp_path / "half", dtype=dtype)
    check_pruned(folder, tmp_path, PruningSpec())


def test_every_tile_of_a_batch_is_what_it_is_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec().resolve(6))
    pixels = sample_pixels(5, 64)
    together = run(file, pixels)
    for tile in range(5):
        alone = run(file, pixels[tile : tile + 1])
        np.testing.assert_array_equal(together["kept_indices"][tile], alone["kept_indices"][0])
        np.testing.assert_allclose(together["image_embeds"][tile], alone["image_embeds"][0], atol=1e-6)


def test_the_encoder_graph_emits_features_and_attention(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = PruningSpec(first_layer=1, num_layers=3).resolve(6)
    pixels = sample_pixels(2, 64)
    outputs = run(write(tiny_checkpoint, tmp_path / "encoder.onnx", spec, kind="encoder"), pixels)
    reference = Reference(tiny_checkpoint, pixels, spec)
    assert list(outputs) == ["features", "attention", "importance"]
    assert outputs["attention"].shape == (2, 3, 3, 65, 65)
    assert relative_error(outputs["features"], reference.features) <= 1e-4
    assert np.abs(outputs["attention"] - reference.attention).max() <= 1e-5
    assert np.abs(outputs["importance"] - reference.importance).max() <= 1e-6


@pytest.mark.parametrize(("precision", "max_error", "min_jaccard"), [("fp16", 1e-2, 0.95), ("int8", 1e-1, 0.8)])
def test_lower_precision_stays_within_its_tolerance(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, max_error: float, min_jaccard: float
) -> None:
    spec = PruningSpec().resolve(6)
    pixels = sample_pixels(2, 64)
    reference = Reference(tiny_checkpoint, pixels, spec)
    outputs = run(write(tiny_checkpoint, tmp_path / "model.onnx", spec, precision), pixels)
    assert outputs["image_embeds"].dtype == np.float32
    assert jaccard(outputs["kept_indices"], select(reference.importance, (8, 8), spec).indices) >= min_jaccard
    kept = np.maximum(outputs["kept_indices"], 0)[:, :, None]
    expected = np.take_along_axis(reference.embeds, kept, axis=1) * (outputs["kept_indices"] >= 0)[:, :, None]
    assert 0 < relative_error(outputs["image_embeds"], expected) <= max_error


def load(file: Path) -> onnx.ModelProto:
    return onnx.load(file, load_external_data=False)


def test_the_graph_needs_nothing_but_standard_operators(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec().resolve(6))
    onnx.checker.check_model(str(file), full_check=True)
    model = load(file)
    # What is not standard has a body that is, so that any runtime takes the graph.
    bodies = {(function.domain, function.name): function for function in model.functions}
    assert bodies.keys() == {("hivtp", "HierarchicalPrune"), ("com.microsoft", "MultiHeadAttention")}
    assert {(node.domain, node.op_type) for node in model.graph.node if node.domain} == bodies.keys()
    assert {node.domain for body in bodies.values() for node in body.node} == {""}
    [prune] = [node for node in model.graph.node if node.domain == "hivtp"]
    assert {item.name: item.s for item in prune.attribute}["plugin_namespace"] == b"hivtp"


def test_only_scoring_layers_materialise_attention_and_the_last_layer_never_runs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec = PruningSpec(first_layer=1, num_layers=2).resolve(6)
    model = load(write(tiny_checkpoint, tmp_path / "model.onnx", spec))
    softmax = [node.name for node in model.graph.node if node.op_type == "Softmax"]
    fused = [node.name for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    assert softmax == [f"layers.{index}.attention.probabilities" for index in (1, 2)]
    assert fused == [f"layers.{index}.attention.fused" for index in (0, 3, 4)]
    used = " ".join(initializer.name for initializer in model.graph.initializer)
    assert "encoder.layers.4." in used
    assert "encoder.layers.5." not in used
    assert "post_layernorm" not in used


def test_an_unpruned_graph_scores_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(write(tiny_checkpoint, tmp_path / "model.onnx", None))
    assert not [node for node in model.graph.node if node.op_type in ("Softmax", "ReduceMean", "HierarchicalPrune")]
    assert [output.name for output in model.graph.output] == ["image_embeds"]


def test_projector_and_last_layer_see_kept_tokens_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = PruningSpec.preset("192", (8, 8)).resolve(6)
    file = write(tiny_checkpoint, tmp_path / "model.onnx", spec)
    model = load(file)
    watched = [
        "projector.inner",
        "projector.output",
        "layers.4.fc1",
        "layers.4.attention.queries",
        "layers.4.attention.keys.matmul",
    ]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in watched)
    onnx.save(model, file)
    outputs = run(file, sample_pixels(1, 64))
    num_rows = {name: outputs[name].shape[1] for name in watched}
    assert spec.keep == 21
    assert num_rows == dict.fromkeys(watched[:4], 21) | {"layers.4.attention.keys.matmul": 65}


def test_the_body_of_fused_attention_computes_what_its_kernel_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec().resolve(6))
    model = load(file)
    # Under another name no runtime has a kernel, and the body is what runs.
    for node in [*model.graph.node, *model.functions]:
        if node.domain == "com.microsoft":
            node.domain = "unknown"
    model.opset_import.append(onnx.helper.make_opsetid("unknown", 1))
    onnx.save(model, tmp_path / "renamed.onnx")
    pixels = sample_pixels(2, 64)
    with_kernel, with_body = run(file, pixels), run(tmp_path / "renamed.onnx", pixels)
    assert relative_error(with_body["image_embeds"], with_kernel["image_embeds"]) < 1e-5
    np.testing.assert_array_equal(with_body["kept_indices"], with_kernel["kept_indices"])


def test_half_graphs_keep_norms_softmax_and_scores_in_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = PruningSpec(first_layer=1, num_layers=2).resolve(6)
    file = write(tiny_checkpoint, tmp_path / "model.onnx", spec, "fp16")
    onnx.checker.check_model(str(file), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(file))
    dtypes = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceMean"):
            assert dtypes[node.input[0]] == onnx.TensorProto.FLOAT, node.name
        if node.op_type in ("MatMul", "MultiHeadAttention"):
            assert dtypes[node.output[0]] == onnx.TensorProto.FLOAT16, node.name
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    for weight in inferred.graph.initializer:
        is_island = weight.name.endswith(".float32") or weight.name in ("layer_share", "padding")
        assert weight.data_type not in floats or (weight.data_type == onnx.TensorProto.FLOAT) == is_island, weight.name
    for value in (*inferred.graph.input, *inferred.graph.output):
        assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)


@pytest.mark.parametrize(("spec", "num_block_layers"), [(None, 0), (PruningSpec(first_layer=1, num_layers=2), 3)])
def test_int8_products_are_in_blocks_up_to_the_scores_and_per_token_after_them(
    tiny_checkpoint: Path, tmp_path: Path, spec: PruningSpec | None, num_block_layers: int
) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", spec and spec.resolve(6), "int8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    nodes = load(tmp_path / "optimized.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    # Five layers of six linear maps, and the projector's two.
    assert kinds.count("MatMulNBits") == num_block_layers * 6
    assert kinds.count("MatMulIntegerToFloat") == (5 - num_block_layers) * 6 + 2
    assert not {"MatMulInteger", "DynamicQuantizeMatMul"} & set(kinds)
    # Queries, keys and values share one rounding, but in the last pruned layer, where queries are of kept tokens.
    is_pruned = spec is not None
    assert kinds.count("QuantizeLinear") == (5 - num_block_layers) * 4 + 2 + is_pruned
    blocks = [node for node in nodes if node.op_type == "MatMulNBits"]
    sizes = {item.i for node in blocks for item in node.attribute if item.name == "block_size"}
    assert sizes == ({128, 32} if is_pruned else set())


@pytest.mark.parametrize("spec", [None, PruningSpec(first_layer=1, num_layers=2)])
def test_a_tile_of_an_int8_graph_gives_what_it_gives_alone(
    tiny_checkpoint: Path, tmp_path: Path, spec: PruningSpec | None
) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", spec and spec.resolve(6), "int8")
    pixels = sample_pixels(3, 64)
    # A scale for all of a run would follow this tile.
    pixels[1] *= 50
    together = run(file, pixels)
    for tile in range(3):
        alone = run(file, pixels[tile : tile + 1])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][tile : tile + 1], values, rtol=1e-5, atol=1e-6)


def with_outliers(folder: Path, place: Path) -> Path:
    """A checkpoint whose norms have a few gains that are 60 times the others."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("layer_norm1.weight", "layer_norm2.weight")):
            tensor[[3, 11]] *= 60
    save_file(tensors, file, {"format": "pt"})
    return place


def test_smoothing_changes_nothing_but_what_rounding_costs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_outliers(tiny_checkpoint, tmp_path / "checkpoint")
    checkpoint, pixels = Checkpoint.open(folder), sample_pixels(2, 64)
    maxima = activation_maxima(checkpoint, 0, [pixels], tmp_path)
    smoothed = SmoothedWeights(checkpoint.tensor, maxima)
    layer = "vision.encoder.layers.0."
    factors = smoothed.factors(layer, "layer_norm2")
    assert factors[3] > 3 * factors.median()
    for kind in ("weight", "bias"):
        name = f"{layer}layer_norm2.{kind}"
        torch.testing.assert_close(smoothed.read(name) * factors, checkpoint.tensor(name).float())
    for linear in ("self_attn.q_proj", "self_attn.v_proj"):
        own = checkpoint.tensor(f"{layer}{linear}.weight").float()
        product = smoothed.read(f"{layer}{linear}.weight") * smoothed.read(f"{layer}layer_norm1.weight")
        torch.testing.assert_close(product, own * checkpoint.tensor(f"{layer}layer_norm1.weight").float())
    assert smoothed.read("projector.linear_1.weight").equal(checkpoint.tensor("projector.linear_1.weight"))
    spec = PruningSpec().resolve(6)
    reference = Reference(folder, pixels, spec)
    errors = {}
    for name, found in {"plain": None, "smoothed": maxima}.items():
        file = tmp_path / f"{name}.onnx"
        save_model(build_vision_graph(checkpoint, spec, "int8", maxima=found), file)
        errors[name] = np.abs(run(file, pixels)["importance"] - reference.importance).max()
    assert errors["smoothed"] < errors["plain"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from([16, 32, 128]))
def test_quantisation_in_blocks_rounds_to_half_a_step(seed: int, num_inputs: int, block_size: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(3, num_inputs)).astype(np.float32)
    weight[1] = 0
    blocks, scale = quantize_in_blocks(weight, block_size)
    assert (blocks.dtype, blocks.shape[2], scale.shape) == (np.uint8, block_size, blocks.shape[:2])
    values = ((blocks.astype(np.float32) - ZERO_POINT) * scale[:, :, None]).reshape(3, -1)
    steps = np.repeat(scale, block_size, axis=1)
    assert (np.abs(values[:, :num_inputs] - weight) <= steps[:, :num_inputs] * 0.5001).all()
    assert not values[:, num_inputs:].any()
    assert not values[1].any()


def test_quantisation_per_channel_rounds_to_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    weight[3] = 0
    matrix, scale = quantize_per_channel(weight)
    assert matrix.dtype == np.int8
    assert matrix.shape == (33, 7)
    error = np.abs(matrix.T * scale[:, None] - weight)
    assert (error <= scale[:, None] * 0.5001).all()
    assert not matrix[:, 3].any()
