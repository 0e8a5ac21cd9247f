from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import (
    load_language_model,
    write_decoder,
    write_embeddings,
)
from hivtp.export.decoder.last_position import cut_to_last_position
from hivtp.export.decoder.model_builder import BUILDER_OPTIONS, builder_class, builder_config
from hivtp.export.verify.checks import relative_error
from hivtp.export.verify.language import verify_language
from hivtp.export.verify.operations.decoder_weights import DecoderWeights
from hivtp.export.verify.reference import language_reference

if TYPE_CHECKING:
    from pathlib import Path


def logits_of(folder: Path, embeds: np.ndarray) -> np.ndarray:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0].numpy()


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"sliding_window": 7},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ],
)
def test_decoder_and_streamed_reference_equal_hugging_face(tmp_path: Path, text: dict) -> None:
    language = "mistral" if "sliding_window" in text else "llama"
    folder = make_checkpoint(tmp_path / "checkpoint", language=language, text=text)
    checkpoint = Checkpoint.open(folder)
    random, lengths, num_last = np.random.default_rng(0), (20, 13, 20), (20, 2, 1)
    sequences = [random.normal(size=(length, 64)).astype(np.float32) * 0.05 for length in lengths]
    streamed = language_reference(checkpoint.config.text_config, checkpoint.language_tensor, sequences, num_last)
    for embeds, logits, num in zip(sequences, streamed, num_last, strict=True):
        assert relative_error(logits, logits_of(folder, embeds)[-num:]) < 1e-5
    report = verify_language(checkpoint, write_decoder(checkpoint, tmp_path, "fp32"), "fp32")
    assert report["relative_error"] < 1e-5
    assert report["argmax_agreement"] == 1.0


@pytest.mark.parametrize("precision", ["int8", "int4", "w8a8"])
def test_a_quantised_decoder_computes_with_its_own_weights(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    report = verify_language(checkpoint, write_decoder(checkpoint, tmp_path, precision), precision)
    assert report["relative_error"] < 0.05
    # Rounding to 4 bits costs more than the kernels' 8-bit activations do.
    assert precision != "int4" or report["relative_error"] < report["quantization_error"] / 5


@pytest.mark.parametrize(("precision", "levels"), [("int8", 127), ("int4", 7), ("w8a8", 127)])
def test_dequantised_weights_are_the_checkpoints_within_half_a_step(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, levels: int
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    weights = DecoderWeights(checkpoint, write_decoder(checkpoint, tmp_path, precision))
    num_quantised = 0
    for name in (location.removeprefix("language.") for location in checkpoint.locations if "language" in location):
        original, found = checkpoint.language_tensor(name), weights.tensor(name)
        assert original.shape == found.shape, name
        if not torch.equal(original, found):
            num_quantised += 1
            assert (original - found).abs().max() <= original.abs().max() / levels * 0.75, name
    assert num_quantised == 2 * 7 + 1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_larger_blocks_round_more_coarsely(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    errors = []
    # The tiny model is 64 and 96 wide: some blocks are cut short.
    for block_size in (16, 64, 256):
        file = write_decoder(checkpoint, tmp_path / str(block_size), precision, block_size=block_size)
        sizes = {
            attribute.i
            for node in onnx.load(file, load_external_data=False).graph.node
            for attribute in node.attribute
            if attribute.name == "block_size"
        }
        assert sizes == {block_size}
        report = verify_language(checkpoint, file, precision)
        assert report["relative_error"] < 0.05
        errors.append(report["quantization_error"])
    assert errors[0] < min(errors[1:])


def test_the_decoder_takes_embeddings_and_prunes_its_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write_decoder(Checkpoint.open(tiny_checkpoint), tmp_path, "fp32")
    graph = onnx.load(file, load_external_data=False).graph
    assert {value.name for value in graph.input} == {"inputs_embeds", "attention_mask"} | {
        f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")
    }
    [logits] = [value for value in graph.output if value.name == "logits"]
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1


@pytest.mark.parametrize("language", ["llama", "mistral"])
@pytest.mark.parametrize("precision", ["fp16", "int4-fp16"])
def test_a_decoder_for_a_gpu_takes_keeps_and_gives_float16(tmp_path: Path, precision: str, language: str) -> None:
    text = {"sliding_window": 7} if language == "mistral" else {}
    folder = make_checkpoint(tmp_path / "checkpoint", language=language, text=text)
    checkpoint = Checkpoint.open(folder)
    file = write_decoder(checkpoint, tmp_path, precision)
    graph = onnx.load(file).graph
    dtypes = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert dtypes.pop("attention_mask") == onnx.TensorProto.INT64
    assert set(dtypes.values()) == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in {item.data_type for item in graph.initializer}
    kinds = {node.op_type for node in graph.node}
    assert "GroupQueryAttention" in kinds
    assert ("MatMulNBits" in kinds) == (precision == "int4-fp16")
    report = verify_language(checkpoint, file, precision)
    assert report["relative_error"] < 5e-3
    assert precision == "int4-fp16" or report["argmax_agreement"] >= 0.7


def test_a_tied_head_decodes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tied", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(folder)
    report = verify_language(checkpoint, write_decoder(checkpoint, tmp_path, "int4"), "int4")
    assert report["relative_error"] < 0.05


@pytest.mark.parametrize(("precision", "num_weights"), [("fp32", None), ("int4", 11)])
def test_progress_is_announced_and_nothing_printed(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], precision: str, num_weights: int | None
) -> None:
    seen = []
    write_decoder(Checkpoint.open(tiny_checkpoint), tmp_path, precision, lambda *progress: seen.append(progress))
    # Two layers of five linear maps, queries, keys and values being one, and the head; in float32 every tensor.
    num_all = num_weights or seen[0][1]
    assert seen == [(done, num_all) for done in range(1, num_all + 1)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("precision", ["int8", "int4", "int4-fp16"])
def test_weights_are_rounded_as_the_model_builder_rounds_them(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    import onnx_ir as ir

    checkpoint = Checkpoint.open(tiny_checkpoint)
    bits, _, is_half = precision.partition("-")
    dtype = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[bits]
    io_dtype, provider = (ir.DataType.FLOAT16, "cuda") if is_half else (ir.DataType.FLOAT, "cpu")
    builder = builder_class("llama")(
        builder_config(checkpoint), io_dtype, dtype, provider, "", {**BUILDER_OPTIONS, "filename": "decoder.onnx"}
    )
    builder.loaded_model = load_language_model(checkpoint)
    builder.make_model("")
    cut_to_last_position(builder.model)
    (tmp_path / "builder").mkdir()
    builder.save_model(str(tmp_path / "builder"))
    models = [
        onnx.load(tmp_path / "builder" / "decoder.onnx"),
        onnx.load(write_decoder(checkpoint, tmp_path, precision)),
    ]
    theirs, ours = ({item.name: item for item in model.graph.initializer} for model in models)
    assert theirs.keys() == ours.keys()
    for name, item in theirs.items():
        assert item.raw_data == ours[name].raw_data, name
    theirs, ours = ({node.name: (node.op_type, *node.attribute) for node in model.graph.node} for model in models)
    assert theirs == ours


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")]
)
def test_embeddings_are_exact(tmp_path: Path, dtype: str, expected: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", dtype=dtype))
    table = np.load(write_embeddings(checkpoint, tmp_path), allow_pickle=False)
    assert table.dtype == expected
    np.testing.assert_array_equal(table, checkpoint.language_tensor("model.embed_tokens.weight").float().numpy())
