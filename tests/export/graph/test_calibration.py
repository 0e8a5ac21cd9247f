from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from transformers import CLIPVisionModel

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, SamplingParams
from hivtp.engines import create_engine, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima, first_fp8_layer
from hivtp.export.graph.rounding import MAX_FP8, quantize_fp8
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.checks import relative_error
from hivtp.export.verify.samples import sample_pixels
from hivtp.main import export, main
from hivtp_ops import PruningSpec
from hivtp_ops.errors import EngineWarning, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPEC = PruningSpec(first_layer=1, num_layers=2, keep=20).resolve(6)
# Of the tower's six layers the last never runs.
FP8_LAYERS = (3, 4)
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def maxima_in_pytorch(checkpoint: Checkpoint, pixels: np.ndarray) -> Mapping[str, np.ndarray]:
    """What the linear layers of transformers' tower multiply."""
    tower = CLIPVisionModel._from_config(checkpoint.config.vision_config).eval()
    tower.load_state_dict({name: tensor.float() for name, tensor in checkpoint.part("vision.").items()}, strict=False)
    found: dict[str, np.ndarray] = {}

    def record(name: str, offset: torch.Tensor | float) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[f"vision.{name}.weight"] = (inputs[0] - offset).abs().amax(dim=(0, 1)).numpy()

        return hook

    modules = dict(tower.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            # The bias of the values is added after the output projection, not before it.
            values = modules.get(name.replace("out_proj", "v_proj")) if name.endswith("out_proj") else None
            module.register_forward_pre_hook(record(name, 0.0 if values is None else values.bias.detach()))
    with torch.inference_mode():
        tower(torch.from_numpy(pixels))
    return found


def test_maxima_are_those_of_pytorch_after_the_scoring_layers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, pixels = Checkpoint.open(tiny_checkpoint), sample_pixels(3, 64)
    found = activation_maxima(checkpoint, 3, [pixels], tmp_path)
    assert list(found) == [f"vision.encoder.layers.{layer}.{name}.weight" for layer in FP8_LAYERS for name in LINEARS]
    expected = maxima_in_pytorch(checkpoint, pixels)
    for weight, sizes in found.items():
        np.testing.assert_allclose(sizes, expected[weight], rtol=1e-4)
    one_by_one = activation_maxima(checkpoint, 3, (pixels[tile : tile + 1] for tile in range(3)), tmp_path)
    for weight, sizes in found.items():
        np.testing.assert_allclose(one_by_one[weight], sizes, rtol=1e-6)
    assert len(activation_maxima(checkpoint, 0, [pixels[:1]], tmp_path)) == 5 * len(LINEARS)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_the_last_layer_leave_nothing_for_fp8(tiny_checkpoint: Path) -> None:
    spec = PruningSpec(first_layer=3, num_layers=2).resolve(6)
    with pytest.raises(SpecError, match="layer 4 is the last of the 5 that run; choose fp16"):
        first_fp8_layer(spec, VisionShape.of(Checkpoint.open(tiny_checkpoint).config))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-2, 1.0, 300.0]))
def test_weights_are_rounded_as_torch_rounds_them(seed: int, size: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(5, 7)) * size).astype(np.float32)
    matrix, scale = quantize_fp8(weight)
    assert (matrix.shape, scale.dtype, scale.shape) == ((7, 5), np.float16, ())
    scaled = torch.from_numpy(weight.T / scale.astype(np.float32)).clamp(-MAX_FP8, MAX_FP8)
    expected = scaled.to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(matrix.astype(np.float32), expected)
    if size > 1e-4:
        assert np.abs(matrix.astype(np.float32)).max() > 0.99 * MAX_FP8


def write(folder: Path, file: Path, precision: str, spec: PruningSpec | None = SPEC) -> Path:
    checkpoint = Checkpoint.open(folder)
    maxima = None
    if precision == "fp8":
        first = first_fp8_layer(spec, VisionShape.of(checkpoint.config))
        maxima = activation_maxima(checkpoint, first, [sample_pixels(1, 64)], file.parent)
    save_model(build_vision_graph(checkpoint, spec, precision, maxima=maxima), file)
    return file


def test_an_fp8_graph_keeps_what_fp16_keeps_and_rounds_what_comes_after(tiny_checkpoint: Path, tmp_path: Path) -> None:
    inputs = {"pixel_values": sample_pixels(4, 64)}
    half, fp8 = (
        create_engine("onnxruntime", write(tiny_checkpoint, tmp_path / f"{precision}.onnx", precision)).run(inputs)
        for precision in ("fp16", "fp8")
    )
    for name in ("kept_indices", "kept_counts", "importance"):
        np.testing.assert_array_equal(fp8[name], half[name])
    # A product of fp8 is off by some hundredths, and two layers of them are added to what is not rounded.
    assert 1e-3 < relative_error(fp8["image_embeds"], half["image_embeds"]) < 5e-2


def test_what_is_multiplied_in_fp8_comes_from_two_dequantizations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tiny_checkpoint, tmp_path / "model.onnx", "fp8")
    onnx.checker.check_model(str(file), full_check=True)
    graph = onnx.load(file).graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {item.name: item for item in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1].endswith(".half")]
    assert len(products) == len(FP8_LAYERS) * len(LINEARS)
    for product in products:
        value, weight = (makers[name] for name in product.input)
        assert [value.op_type, weight.op_type] == ["DequantizeLinear"] * 2
        stored = constants[weight.input[0]]
        assert stored.data_type == TensorProto.FLOAT8E4M3FN
        rounding = makers[value.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert [*rounding.input[1:]] == [*value.input[1:]]
        for scale in (weight.input[1], value.input[1]):
            assert constants[scale].data_type == TensorProto.FLOAT16
            assert numpy_helper.to_array(constants[scale]) > 0
    # Queries, keys and values of a layer are rounded once; in the last layer queries are those of the kept rows.
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == len(FP8_LAYERS) * 4 + 1


def test_the_command_exports_fp8_and_says_how_it_was_calibrated(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--vision-precision", "fp8", "--language-precision", "none", "--calibration-images", str(photo)]
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 0
    printed, progress = capsys.readouterr()
    [line] = [line for line in printed.splitlines() if line.startswith("vision ")]
    assert line.split()[1] == "fp8"
    assert line.endswith("calibrated on 1 image")
    assert "[2/6] Calibration on 1 images: done" in progress
    bundle = Bundle.open(tmp_path / "bundle", check_hashes=True)
    found = bundle.manifest.verification["vision"]
    assert (bundle.manifest.vision.precision, found["calibration_images"]) == ("fp8", 1)
    assert 1e-3 < found["relative_error"] <= found["tolerance"]["relative_error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision-precision", "fp8"], "fp8 takes its scales from images .* give some files with calibration"),
        (
            ["--calibration-images", "a.jpg"],
            "calibration images are for vision_precision fp8, not fp32; leave them out",
        ),
        (["--vision-precision", "fp8", "--calibration-images", "absent.jpg"], "there is no image file .absent.jpg"),
    ],
)
def test_fp8_without_images_and_images_without_fp8_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), "--quiet", *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "settings", "num_rounded"),
    [
        ("llava", {"is_pruned": False}, 5 * 6),
        ("llava", {"graph": "encoder"}, 2 * 6),
        ("llava", {"preset": "192", "decoder_from": "pruned"}, 2 * 6),
        ("llava_next", {"preset": "192"}, 2 * 6),
        ("llava full", {"preset": "192"}, 2 * 6),
    ],
)
def test_fp8_goes_with_every_other_choice(
    tiny_checkpoint: Path,
    pruned_bundle: Path,
    photo: Path,
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    num_rounded: int,
) -> None:
    folder = tiny_checkpoint
    if family == "llava_next":
        folder = make_checkpoint(tmp_path / "checkpoint", family=family)
    elif family == "llava full":
        folder = make_checkpoint(tmp_path / "checkpoint", vision_feature_select_strategy="full")
    if "decoder_from" in settings:
        settings = settings | {"decoder_from": pruned_bundle}
    elif settings.get("graph") != "encoder":
        settings = settings | {"language_precision": "none"}
    asked = ExportSettings(vision_precision="fp8", calibration=(photo, photo), **settings)
    bundle = export_bundle(folder, tmp_path / "bundle", asked, is_quiet=True)
    assert bundle.manifest.verification["vision"]["calibration_images"] == 2
    graph = onnx.load(bundle.vision_file, load_external_data=False).graph
    assert sum(item.data_type == TensorProto.FLOAT8E4M3FN and len(item.dims) == 2 for item in graph.initializer) == (
        num_rounded
    )
    if "decoder_from" in settings:
        with pytest.warns(EngineWarning, match="rounds to fp8"):
            pipeline = Pipeline.load(bundle.folder)
        answer = pipeline.generate("what", [photo], SamplingParams(max_new_tokens=4))
        assert (answer.num_image_tokens, answer.num_kept_tokens) == (64, 21)


def test_layers_are_chosen_without_calibration(
    tiny_checkpoint: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(tiny_checkpoint), str(photo), "--criterion", "features", "--quiet"]) == 0
    assert "export with: --first-layer" in capsys.readouterr().out
    options = ["--vision-precision", "fp8", "--choose-layers", str(photo), "--quiet"]
    assert export([str(tiny_checkpoint), *options]) == 0
    assert "export with: --first-layer" in capsys.readouterr().out


def test_other_engines_than_tensorrt_warn(fp8_bundle: Path) -> None:
    bundle = Bundle.open(fp8_bundle)
    with pytest.warns(EngineWarning, match=r"onnxruntime rounds to fp8 .* multiplies in a wider type, .* build a plan"):
        open_vision_engine(bundle, "onnxruntime")
