from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import open_session
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import write_decoder
from hivtp.export.decoder.w8a8 import quantize_products
from hivtp.export.exporter import export_bundle
from hivtp.export.graph.linear import INT8_PRODUCT
from hivtp.export.graph.rounding import quantize_per_channel
from hivtp.export.settings import ExportSettings
from hivtp.export.verify import language as verification
from hivtp.export.verify.checks import relative_error
from hivtp.export.verify.operations.decoder_weights import DecoderWeights
from hivtp.main import export
from hivtp_ops.errors import SpecError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    import onnxruntime
    from numpy.typing import NDArray

WIDTH, NUM_CHANNELS = 24, 40
WEIGHT = np.random.default_rng(1).normal(size=(WIDTH, NUM_CHANNELS)).astype(np.float32)


def two_products() -> ir.Model:
    """Two products of one activation, as gate and up projection are."""
    value = ir.val("value", dtype=ir.DataType.FLOAT, shape=["batch", "positions", WIDTH])
    weights = [
        ir.val(name, const_value=ir.tensor(matrix, name=name))
        for name, matrix in (("first", WEIGHT), ("second", -2 * WEIGHT))
    ]
    nodes = [ir.node("MatMul", [value, weight], name=f"/{weight.name}") for weight in weights]
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output"
        node.outputs[0].dtype = ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([value], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21, "com.microsoft": 1})
    graph.name = "two_products"
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    model, file = two_products(), tmp_path_factory.mktemp("products") / "products.onnx"
    quantize_products(model)
    ir.save(model, file)
    return open_session(file)


def w8a8(value: NDArray[np.float32]) -> NDArray[np.float64]:
    """The product by its definition, exact in whole numbers."""
    matrix, channel_scales = quantize_per_channel(WEIGHT.T)
    scales = np.maximum(np.abs(value).max(axis=-1, keepdims=True), 1e-30) * np.float32(1 / 127)
    whole = np.rint(value / scales).astype(np.int64) @ matrix.astype(np.int64)
    return whole * scales.astype(np.float64) * channel_scales


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 1e-20, 1e20]),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_products_are_those_of_the_definition(
    session: onnxruntime.InferenceSession, batch: int, positions: int, seed: int, size: float, outlier: float
) -> None:
    random = np.random.default_rng(seed)
    value = random.normal(size=(batch, positions, WIDTH)) * size
    value[:, random.integers(positions)] *= outlier
    value = value.astype(np.float32)
    first, second = session.run(None, {"value": value})
    expected = w8a8(value)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5 * size * max(1.0, outlier))
    np.testing.assert_allclose(second, -2 * first, rtol=1e-5, atol=1e-6 * size * max(1.0, outlier))


def test_a_position_gives_the_same_whatever_stands_beside_it(session: onnxruntime.InferenceSession) -> None:
    value = np.random.default_rng(2).normal(size=(2, 5, WIDTH)).astype(np.float32)
    value[0, 1] *= 1e4
    together = session.run(None, {"value": value})[0]
    for row in range(2):
        for position in range(5):
            [alone, _] = session.run(None, {"value": value[row : row + 1, position : position + 1]})
            np.testing.assert_array_equal(alone[0, 0], together[row, position])
    # With one scale for all, the outliers would leave nothing of the others.
    exact = value[1].astype(np.float64) @ WEIGHT
    assert np.linalg.norm(together[1] - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("language", ["llama", "mistral"])
def test_every_product_of_a_decoder_is_int8_and_shares_what_it_rounds(
    tiny_checkpoint: Path, tmp_path: Path, language: str
) -> None:
    folder = tiny_checkpoint if language == "llama" else make_checkpoint(tmp_path / "checkpoint", language=language)
    graph = onnx.load(write_decoder(Checkpoint.open(folder), tmp_path, "w8a8", name="prefill.onnx")).graph
    kinds = Counter(node.op_type for node in graph.node)
    # Two layers of stacked q, k and v, output, gate, up and down; and the head.
    assert (kinds[INT8_PRODUCT], kinds["MatMul"]) == (2 * 5 + 1, 0)
    # Gate and up multiply the same.
    assert kinds["QuantizeLinear"] == 2 * 4 + 1
    assert not (tmp_path / "decoder.onnx").exists()
    matrices = [item for item in graph.initializer if len(item.dims) == 2]
    weights = [item for item in matrices if item.data_type == onnx.TensorProto.INT8]
    assert len(weights) == 2 * 5 + 1


def test_a_decoder_is_pytorch_with_the_same_rounding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    file = write_decoder(checkpoint, tmp_path, "w8a8")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    weights = DecoderWeights(checkpoint, file)

    def round_positions(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        [value] = inputs
        scales = value.abs().amax(dim=-1, keepdim=True) / 127
        return ((value / scales).round() * scales,)

    modules = {"lm_head": model.lm_head}
    modules |= {f"model.{name}": module for name, module in model.model.language_model.named_modules()}
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = weights.tensor(f"{name}.weight")
            module.register_forward_pre_hook(round_positions)
    embeds = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    with torch.inference_mode():
        expected = model(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0, -1].numpy()
    names = {value.name for value in onnx.load(file, load_external_data=False).graph.input}
    session = open_session(file)
    config = checkpoint.config.text_config
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    past = {name: empty for name in names if name.startswith("past_key_values")}
    inputs = {"inputs_embeds": embeds[None], "attention_mask": np.ones((1, len(embeds)), np.int64), **past}
    [logits] = session.run(["logits"], inputs)
    # In more layers a difference in the last digit grows: it moves what lies between two steps.
    assert relative_error(logits[0, -1], expected) < 1e-5


def test_the_command_writes_a_second_decoder_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    options = ["--language-precision", "int4", "--prefill-precision", "w8a8"]
    assert export([str(tiny_checkpoint), str(folder), *options]) == 0
    printed, progress = capsys.readouterr()
    [line] = [line for line in printed.splitlines() if line.startswith("prefill ")]
    assert line.split()[1] == "w8a8"
    assert "rounding costs" in line
    assert re.search(r"\[9/11\] .* against PyTorch: done", progress)
    manifest = Bundle.open(folder, check_hashes=True).manifest
    decoder = manifest.language.decoder
    assert (decoder.precision, decoder.prefill_precision) == ("int4", "w8a8")
    assert decoder.prefill_file == "language/prefill.onnx"
    found = manifest.verification
    assert found["prefill"]["relative_error"] <= found["prefill"]["tolerance"]["relative_error"]
    assert found["prefill"]["quantization_error"] < found["language"]["quantization_error"]
    size = sum(record.num_bytes for path, record in manifest.files.items() if path.startswith("language/prefill"))
    assert line.split()[2] == f"{size / 1e6:.1f}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language_precision": "w8a8"}, "already runs prompts in w8a8"),
        ({"language_precision": "fp16"}, "prefill_precision is for a CPU, and language_precision fp16 is for a GPU"),
        ({"language_precision": "none"}, "prefill_precision is for a decoder"),
        ({"graph": "encoder"}, "an encoder bundle has no decoder; drop prefill_precision"),
    ],
)
def test_a_second_decoder_that_makes_no_sense_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ExportSettings(prefill_precision="w8a8", **options)


def test_one_that_is_too_far_off_can_be_left_out(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "LANGUAGE_TOLERANCES", {**verification.LANGUAGE_TOLERANCES, "w8a8": 1e-9})
    with pytest.raises(VerificationError, match=r"the w8a8 prefill decoder differs .* Leave --prefill-precision out"):
        export_bundle(tiny_checkpoint, tmp_path / "a", ExportSettings(prefill_precision="w8a8"), is_quiet=True)
    with pytest.raises(VerificationError, match=r"the w8a8 decoder differs .* Choose a higher precision"):
        export_bundle(tiny_checkpoint, tmp_path / "b", ExportSettings(language_precision="w8a8"), is_quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_no_other_precision_is_for_prompts() -> None:
    with pytest.raises(SpecError, match="prefill_precision is 'int4'; choose one of w8a8, None"):
        ExportSettings(prefill_precision="int4")
