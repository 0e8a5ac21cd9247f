"""Decoders against PyTorch: right ones pass, at every size and depth; each planted fault is refused."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import write_decoder
from hivtp.export.verify import language
from hivtp.export.verify.language import decisive_agreement, verify_language
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PRECISIONS = ("fp32", "int8", "int4", "w8a8", "fp16", "int4-fp16")
# Of the fault checkpoint: wide enough for several heads, with every bias that a Llama can have.
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("faults") / "checkpoint"
    text = {"initializer_range": 0.2, "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True}
    return Checkpoint.open(with_random_biases(make_checkpoint(folder, text=text)))


def with_random_biases(folder: Path) -> Path:
    """transformers starts the biases of a Llama at zero, where dropping them changes nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    torch.manual_seed(1)
    tensors = {
        name: torch.randn_like(tensor) * 0.3 if name.endswith("bias") and "language_model" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=PRECISIONS)
def decoder(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A right decoder of each precision, and its precision."""
    folder = tmp_path_factory.mktemp("decoder")
    return write_decoder(checkpoint, folder, request.param), request.param


@pytest.fixture
def model(decoder: Any, tmp_path: Path) -> Any:
    """A copy of it to plant faults in: the graph, where to save it, and its precision."""
    file, precision = decoder
    copy = shutil.copytree(file.parent, tmp_path / "copy") / file.name
    return onnx.load(copy), copy, precision


def weights_of(graph: onnx.GraphProto, path: str) -> list[onnx.TensorProto]:
    """What a graph holds of one linear layer: a matrix, or rounded values and their scales."""
    found = [item for item in graph.initializer if item.name.startswith(f"{path}.MatMul.weight")]
    assert found, path
    return found


def change(tensor: onnx.TensorProto, function: Callable[[np.ndarray], np.ndarray]) -> None:
    values = function(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def layer_of_another(graph: onnx.GraphProto) -> None:
    """All weights of layer 1 are those of layer 2."""
    for product in ("attn.qkv_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        pairs = [weights_of(graph, f"model.layers.{layer}.{product}") for layer in (1, 2)]
        for first, second in zip(*pairs, strict=True):
            name = first.name
            first.CopyFrom(second)
            first.name = name


def one_projection_of_another(graph: onnx.GraphProto) -> None:
    for first, second in zip(
        weights_of(graph, "model.layers.2.mlp.up_proj"), weights_of(graph, "model.layers.0.mlp.up_proj"), strict=True
    ):
        name = first.name
        first.CopyFrom(second)
        first.name = name


def heads_swapped(graph: onnx.GraphProto) -> None:
    """Two query heads change places."""
    outputs = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE
    order = np.arange(outputs)
    order[: 2 * HEAD_SIZE] = np.concatenate([order[HEAD_SIZE : 2 * HEAD_SIZE], order[:HEAD_SIZE]])
    for tensor in weights_of(graph, "model.layers.1.attn.qkv_proj"):
        shape = tuple(tensor.dims)
        # Outputs are the last axis of a matrix, and the first of weights in blocks.
        axis = len(shape) - 1 if shape[-1] == outputs else 0
        if shape[axis] == outputs:
            change(tensor, lambda values, axis=axis: np.take(values, order, axis))
        else:
            change(tensor, lambda values: values.reshape(outputs, -1)[order].reshape(values.shape))


def one_value_head_lost(graph: onnx.GraphProto) -> None:
    """The scales or weights of one value head are zero."""
    outputs = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE
    tensors = weights_of(graph, "model.layers.1.attn.qkv_proj")
    [tensor] = [item for item in tensors if "scales" in item.name] or tensors

    def zero(values: np.ndarray) -> np.ndarray:
        if values.shape[-1] == outputs:
            values[..., -HEAD_SIZE:] = 0
        else:
            values.reshape(outputs, -1)[-HEAD_SIZE:] = 0
        return values

    change(tensor, zero)


def rope_of_another_base(graph: onnx.GraphProto) -> None:
    positions = np.arange(512)[:, None] / 9_000.0 ** (np.arange(HEAD_SIZE // 2) * 2 / HEAD_SIZE)
    for name, values in (("cos_cache", np.cos(positions)), ("sin_cache", np.sin(positions))):
        [tensor] = [item for item in graph.initializer if item.name == name]
        change(tensor, lambda old, values=values: values[: len(old)].astype(old.dtype))


def rope_without_its_scaling(graph: onnx.GraphProto) -> None:
    """Positions count half."""
    for name in ("cos_cache", "sin_cache"):
        [tensor] = [item for item in graph.initializer if item.name == name]
        change(tensor, lambda old: np.repeat(old, 2, axis=0)[: len(old)])


def norm_of_another_epsilon(graph: onnx.GraphProto) -> None:
    [node] = [node for node in graph.node if node.name == "/model/layers.0/input_layernorm/LayerNorm"]
    [epsilon] = [item for item in node.attribute if item.name == "epsilon"]
    assert epsilon.f < 1e-5
    # The squares of the embeddings have a mean of 0.04.
    epsilon.f = 1e-3


def norm_weight_scaled(graph: onnx.GraphProto) -> None:
    [tensor] = [item for item in graph.initializer if item.name == "model.layers.2.post_attention_layernorm.weight"]
    change(tensor, lambda values: values * values.dtype.type(1.1))


def bias_dropped(graph: onnx.GraphProto) -> None:
    [tensor] = [item for item in graph.initializer if item.name == "model.layers.1.attn.o_proj.Add.bias"]
    change(tensor, np.zeros_like)


def mlp_bias_dropped(graph: onnx.GraphProto) -> None:
    [tensor] = [item for item in graph.initializer if item.name == "model.layers.0.mlp.gate_proj.Add.bias"]
    change(tensor, np.zeros_like)


def residual_of_another_layer(graph: onnx.GraphProto) -> None:
    [node] = [node for node in graph.node if node.name == "/model/layers.1/post_attention_layernorm/SkipLayerNorm"]
    node.input[0] = "inputs_embeds"


def gate_without_its_activation(graph: onnx.GraphProto) -> None:
    [node] = [node for node in graph.node if node.name == "/model/layers.1/mlp/Mul"]
    node.input[0] = "/model/layers.1/mlp/gate_proj/Add/output_0"


def head_of_other_tokens(graph: onnx.GraphProto) -> None:
    """Two tokens of the vocabulary have each other's logits."""
    order = np.arange(512)
    order[[7, 9]] = [9, 7]
    for tensor in weights_of(graph, "lm_head"):
        shape = tuple(tensor.dims)
        axis = len(shape) - 1 if shape[-1] == 512 else 0
        if shape[axis] == 512:
            change(tensor, lambda values, axis=axis: np.take(values, order, axis))
        else:
            change(tensor, lambda values: values.reshape(512, -1)[order].reshape(values.shape))


FAULTS = (
    layer_of_another,
    one_projection_of_another,
    heads_swapped,
    one_value_head_lost,
    rope_of_another_base,
    rope_without_its_scaling,
    norm_of_another_epsilon,
    norm_weight_scaled,
    bias_dropped,
    mlp_bias_dropped,
    residual_of_another_layer,
    gate_without_its_activation,
    head_of_other_tokens,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_refused(checkpoint: Checkpoint, model: Any, fault: Callable[..., None]) -> None:
    proto, file, precision = model
    fault(proto.graph)
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match=rf"the {precision} decoder differs from PyTorch in (layer \d|head), "):
        verify_language(checkpoint, file, precision)
    assert not list(file.parent.glob("checked-*"))


def test_a_right_decoder_passes_and_the_report_says_how_close_it_is(checkpoint: Checkpoint, decoder: Any) -> None:
    file, precision = decoder
    report = verify_language(checkpoint, file, precision)
    assert 0 < report["relative_error"] <= report["tolerance"]["relative_error"]
    assert report["decisive_agreement"] in (None, 1.0)
    errors = report["layers"]["errors"]
    assert ("weights" in errors) == (precision not in ("fp32", "fp16"))
    assert ("rounding" in errors) == (precision == "w8a8")
    assert errors["operation"] < (1e-5 if precision in ("fp32", "int8", "int4", "w8a8") else 5e-3)
    assert sorted(item.name for item in file.parent.iterdir()) == ["decoder.onnx", "decoder.onnx.data"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"num_hidden_layers": 8, "initializer_range": 0.1}),
        ("llama", {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 7, "initializer_range": 0.2}),
    ],
)
def test_right_decoders_of_other_shapes_pass(
    tmp_path: Path, language: str, text: dict[str, Any], precision: str
) -> None:
    seed = sum(map(ord, precision))
    folder = make_checkpoint(tmp_path / "checkpoint", language=language, text=text, seed=seed)
    opened = Checkpoint.open(folder)
    report = verify_language(opened, write_decoder(opened, tmp_path / "decoder", precision), precision)
    assert report["relative_error"] > 0


@pytest.mark.parametrize("precision", ["fp32", "int4", "w8a8", "fp16"])
def test_depth_does_not_hide_a_fault(tmp_path: Path, precision: str) -> None:
    text = {"num_hidden_layers": 32, "initializer_range": 0.1}
    opened = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", text=text))
    file = write_decoder(opened, tmp_path / "decoder", precision)
    report = verify_language(opened, file, precision)
    tolerance = {"fp32": 1e-4, "int4": 1e-4, "w8a8": 1e-4, "fp16": 8e-3}[precision]
    assert report["layers"]["tolerance"]["operation"] == tolerance
    proto = onnx.load(file)
    one_projection_of_another(proto.graph)
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match="in layer 2, "):
        verify_language(opened, file, precision)


def test_nan_is_refused(checkpoint: Checkpoint, model: Any) -> None:
    proto, file, precision = model
    [tensor] = [item for item in proto.graph.initializer if item.name == "model.layers.0.input_layernorm.weight"]
    change(tensor, lambda values: values * values.dtype.type(np.nan))
    onnx.save(proto, file)
    with pytest.raises(VerificationError, match="error is nan"):
        verify_language(checkpoint, file, precision)


def test_a_decoder_that_is_too_coarse_as_a_whole_is_refused(
    checkpoint: Checkpoint, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, precision = decoder
    monkeypatch.setattr(language, "LANGUAGE_TOLERANCES", dict.fromkeys(PRECISIONS, 1e-9))
    with pytest.raises(
        VerificationError, match=rf"the {precision} decoder .* its relative error is .* Choose a higher"
    ):
        verify_language(checkpoint, file, precision)
    with pytest.raises(VerificationError, match=r"the \S+ prefill decoder .* Leave --prefill-precision out"):
        verify_language(checkpoint, file, precision, is_for_prompts=True)


def test_a_graph_of_another_builder_is_refused_in_words(checkpoint: Checkpoint, model: Any) -> None:
    proto, file, precision = model
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("/mlp/Mul/", "/mlp/Product/") for name in names]
    onnx.save(proto, file)
    with pytest.raises(
        VerificationError, match=r"has no value /model/layers\.0/mlp/Mul/output_0, so it cannot be check"
    ):
        verify_language(checkpoint, file, precision)


def test_the_best_token_must_be_right_where_the_error_does_not_decide() -> None:
    random = np.random.default_rng(0)
    expected = random.normal(size=(3, 100)).astype(np.float32)
    expected[:, 4] = [10, 10, 2.7]
    found = expected + random.normal(size=expected.shape).astype(np.float32) * 0.1
    assert decisive_agreement(found, expected) == 1.0
    # The third position is close, so that nothing is said of it.
    found[2, 4] = 0
    assert decisive_agreement(found, expected) == 1.0
    found[0, 5] = 20
    assert decisive_agreement(found, expected) < 1.0
    assert decisive_agreement(expected + 1e-3, np.zeros_like(expected)) is None


def test_a_wrong_best_token_is_refused(checkpoint: Checkpoint, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, precision = decoder
    monkeypatch.setattr(language, "decisive_agreement", lambda *_logits: 0.75)
    with pytest.raises(
        VerificationError, match=r"agreement where the best token is clear is 0\.75, allowed is at least 1"
    ):
        verify_language(checkpoint, file, precision)
