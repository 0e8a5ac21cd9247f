"""The vision graph in PyTorch against the same file in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines import create_engine
from hivtp.engines.torch.graph import load_graph
from hivtp.export.checkpoint import Checkpoint
from hivtp.export.clip import VisionShape
from hivtp.export.graph import save_model
from hivtp.export.verification import relative_error, sample_pixels
from hivtp.export.vision import build_vision_graph
from hivtp_ops import PruningSpec, select
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

SPEC = PruningSpec(first_layer=2, num_layers=2)


def write(folder: Path, file: Path, spec: PruningSpec | None, precision: str = "fp32", kind: str = "vision") -> Path:
    checkpoint = Checkpoint.open(folder)
    resolved = spec and spec.resolve(VisionShape.of(checkpoint.config).num_layers)
    save_model(build_vision_graph(checkpoint, resolved, precision, kind), file)
    return file


def sample_inputs(file: Path, num_tiles: int) -> dict[str, np.ndarray]:
    model, _ = load_graph(file)
    pixels, *masks = model.graph.inputs
    inputs = {"pixel_values": sample_pixels(num_tiles, pixels.shape[2])}
    for mask in masks:
        inputs[mask.name] = np.random.default_rng(0).random((num_tiles, mask.shape[1])) > 0.3
    return inputs


def run(file: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    _, module = load_graph(file)
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(array) for array in inputs.values()))
    return {name: output.numpy() for name, output in outputs.items()}


def check(file: Path, num_tiles: int = 3, tolerance: float = 1e-5) -> None:
    inputs = sample_inputs(file, num_tiles)
    expected = create_engine("onnxruntime", file).run(inputs)
    found = run(file, inputs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        if array.dtype == np.int64:
            np.testing.assert_array_equal(found[name], array)
        else:
            np.testing.assert_array_equal(np.isfinite(found[name]), np.isfinite(array))
            is_finite = np.isfinite(array)
            assert relative_error(found[name][is_finite], array[is_finite]) <= tolerance


@pytest.mark.parametrize("preset", ["paper", "192", "64"])
def test_a_pruned_graph_gives_what_onnxruntime_gives(tiny_checkpoint: Path, tmp_path: Path, preset: str) -> None:
    check(write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec.preset(preset, (8, 8))))


@pytest.mark.parametrize("kind", ["vision", "encoder"])
def test_an_unpruned_graph_does(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    check(write(tiny_checkpoint, tmp_path / "model.onnx", SPEC if kind == "encoder" else None, kind=kind))


def test_a_graph_with_padding_that_is_never_kept_does(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    check(write(folder, tmp_path / "model.onnx", PruningSpec.preset("192", (8, 8))), num_tiles=5)


@pytest.mark.parametrize(
    ("vision", "config"),
    [
        ({}, {"vision_feature_select_strategy": "full"}),
        ({}, {"vision_feature_layer": 1}),
        ({}, {"multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
        ({"hidden_act": "gelu_pytorch_tanh", "image_size": 60, "patch_size": 12}, {"vision_feature_layer": -1}),
        ({"hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 1}, {}),
    ],
)
def test_graphs_of_other_models_do(tmp_path: Path, vision: dict[str, Any], config: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", vision=vision, **config)
    check(write(folder, tmp_path / "model.onnx", SPEC))


@pytest.mark.parametrize(("precision", "half"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_half_graph_computes_in_half_with_its_islands(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, half: torch.dtype
) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec.preset("192", (8, 8)), precision)
    _, module = load_graph(file)
    matrices = [weight for weight in module.buffers() if weight.ndim == 2 and min(weight.shape) > 1]
    assert {weight.dtype for weight in matrices} == {half}
    others = {weight.dtype for weight in module.buffers() if weight.ndim < 2 and weight.is_floating_point()}
    # Biases of products, and what the norms scale and shift by.
    assert others == {half, torch.float32}


def test_a_float16_graph_gives_what_onnxruntime_gives(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = PruningSpec.preset("192", (8, 8))
    check(write(tiny_checkpoint, tmp_path / "model.onnx", spec, "fp16"), tolerance=4e-3)


@pytest.mark.parametrize("preset", ["192", "64"])
def test_a_bfloat16_graph_keeps_what_transformers_in_bfloat16_keeps(
    tiny_checkpoint: Path, tmp_path: Path, preset: str
) -> None:
    spec = PruningSpec.preset(preset, (8, 8)).resolve(6)
    file = write(tiny_checkpoint, tmp_path / "model.onnx", spec, "bf16")
    inputs = sample_inputs(file, 5)
    found = run(file, inputs)
    importance, embeds = transformers_in_bfloat16(tiny_checkpoint, spec, inputs["pixel_values"])
    expected = select(importance, (8, 8), spec)
    np.testing.assert_array_equal(found["kept_indices"], select(found["importance"], (8, 8), spec).indices)
    difference = np.abs(found["importance"] - importance).max()
    assert difference <= 2e-3
    for tile in range(5):
        ours, theirs = (set(kept[tile].tolist()) for kept in (found["kept_indices"], expected.indices))
        # Where they part the scores are near ties: each patch stands for one that scores the same, to that difference.
        for patch in ours ^ theirs:
            others = list(theirs - ours if patch in ours else ours - theirs)
            assert np.abs(importance[tile, others] - importance[tile, patch]).min() <= 2 * difference
        rows = sorted(ours & theirs)
        assert len(rows) >= 0.85 * spec.keep
        place = [found["kept_indices"][tile].tolist().index(row) for row in rows]
        assert relative_error(found["image_embeds"][tile, place], embeds[tile, rows]) <= 2e-2


def transformers_in_bfloat16(folder: Path, spec: PruningSpec, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [tiles, patches] and embeddings [tiles, patches, hidden], float32."""
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = LlavaForConditionalGeneration.from_pretrained(folder, **options).eval().model
    with torch.inference_mode():
        values = torch.from_numpy(pixels).bfloat16()
        tower = model.vision_tower(values, output_attentions=True, output_hidden_states=True)
        embeds = model.multi_modal_projector(tower.hidden_states[model.config.vision_feature_layer][:, 1:])
    layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)
    attention = torch.stack(tower.attentions[layers], dim=1).float().numpy()
    return attention.mean(axis=(1, 2, 3))[:, 1:], embeds.float().numpy()


def test_what_multiplies_the_same_value_is_one_product(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, module = load_graph(write(tiny_checkpoint, tmp_path / "model.onnx", SPEC))
    products = [node for node in module.graph.nodes if node.target is torch.nn.functional.linear]
    # Of each layer queries, keys and values together, the output and the two of the MLP; of the last, the queries
    # are of the kept rows alone. Beside them the patches and the projector.
    assert len(products) == 4 * 4 + 5 + 3
    # The biases went into the products; what is added still are positions, residuals, scores and row numbers.
    num_added = sum(node.op_type == "Add" for node in model.graph)
    assert sum(node.name.startswith("add") for node in module.graph.nodes) == num_added - (5 * 4 + 2)


def test_any_number_of_tiles_fits_one_compiled_graph_each(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", PruningSpec.preset("192", (8, 8)))
    _, module = load_graph(file)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    for num_tiles in (1, 2):
        inputs = sample_inputs(file, num_tiles)
        with torch.no_grad():
            found = compiled(torch.from_numpy(inputs["pixel_values"]))
        for name, array in run(file, inputs).items():
            np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-4, atol=1e-6)


def test_an_int8_graph_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", SPEC, "int8")
    with pytest.raises(EngineError, match=r"model\.onnx: it holds the operator DynamicQuantizeLinear; an int8 graph"):
        load_graph(file)


@pytest.mark.parametrize("what", ["graph", "weights"])
def test_a_damaged_file_is_refused(tiny_checkpoint: Path, tmp_path: Path, what: str) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", SPEC)
    damaged = file if what == "graph" else file.with_name("model.onnx.data")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"torch cannot read .*copy or export the bundle again"):
        load_graph(file)
