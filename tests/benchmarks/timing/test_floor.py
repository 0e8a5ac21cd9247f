from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.checkpoints import make_config, model_class
from benchmarks.timing.floor import (
    Format,
    Peaks,
    Work,
    decode_step,
    decoder_layer,
    encoder_layer,
    prefill,
    vision_stage,
)
from hivtp.engines.bundle import Bundle
from hivtp.export.graph.shape import VisionShape

FLOAT = Format(4, 4)
HALF = Format(2, 2)
INT8 = Format(1, 4, is_int8=True)


@pytest.fixture(scope="module", params=["tiny", "demo"])
def model(request: pytest.FixtureRequest) -> Any:
    """LLaVA in transformers; its eager attention is products that the counter knows."""
    config = make_config(request.param)
    config._attn_implementation = "eager"
    return model_class("llava")(config).eval()


def counted_flops(call: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_unpruned_vision_stage_is_what_transformers_computes_up_to_the_feature_layer(model: Any) -> None:
    shape = VisionShape.of(model.config)
    pixels = torch.zeros(2, 3, shape.image_size, shape.image_size)
    counted = counted_flops(lambda: model.model.get_image_features(pixel_values=pixels))
    # transformers runs the layer after it too.
    num_tokens, layer = 1 + shape.num_patches, encoder_layer(model.config)
    beyond = layer.linear(num_tokens, num_tokens) + layer.attention(num_tokens**2)
    assert shape.num_layers == shape.num_feature_layers + 1
    assert vision_stage(model.config, None, FLOAT, num_tiles=2).flops == counted - 2 * beyond


def test_a_prefill_is_what_transformers_computes_less_what_nobody_reads(model: Any) -> None:
    length, text, layer = 37, model.config.text_config, decoder_layer(model.config)
    embeds = torch.zeros(1, length, text.hidden_size)
    counted = counted_flops(lambda: model(inputs_embeds=embeds, logits_to_keep=1))
    # Eager attention computes all pairs and masks half; and transformers runs the last layer for all positions.
    masked = layer.attention(length**2 - length * (length + 1) / 2)
    last = layer.linear(length, length) - layer.linear(1, length) + layer.attention(length**2 - length)
    assert prefill(model.config, length, FLOAT).flops == counted - (text.num_hidden_layers - 1) * masked - last


def test_a_step_is_what_transformers_computes(model: Any) -> None:
    from transformers import DynamicCache

    cache, hidden = DynamicCache(), model.config.text_config.hidden_size
    with torch.inference_mode():
        model(inputs_embeds=torch.zeros(1, 11, hidden), past_key_values=cache, use_cache=True)
    counted = counted_flops(lambda: model(inputs_embeds=torch.zeros(1, 1, hidden), past_key_values=cache))
    assert decode_step(model.config, 11, FLOAT).flops == counted


def test_the_bytes_are_those_of_all_matrices_and_of_the_kv_cache(model: Any) -> None:
    matrices = {name: weight.numel() for name, weight in model.named_parameters() if weight.dim() >= 2}
    embeddings = ("embed_tokens", "position_embedding")
    language = sum(
        num for name, num in matrices.items() if ("language" in name or "lm_head" in name) and embeddings[0] not in name
    )
    text = model.config.text_config
    by_position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert decode_step(model.config, 10, FLOAT).bytes == 4 * (language + 10 * by_position)
    assert prefill(model.config, 10, HALF).bytes == 2 * (language + 10 * by_position)
    # The KV cache stays in float32 where the weights are rounded.
    assert decode_step(model.config, 10, Format(0.625, 4, is_int8=True)).bytes == 0.625 * language + 40 * by_position
    last = f"layers.{model.config.vision_config.num_hidden_layers - 1}."
    vision = sum(
        num
        for name, num in matrices.items()
        if ("vision_tower" in name or "projector" in name) and embeddings[1] not in name and last not in name
    )
    assert vision_stage(model.config, None, HALF, num_tiles=5).bytes == 2 * vision


def run(model: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    """Every output of a graph, whose operators are those of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    # As they are written, so that all values are there to be read.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixels})


def graph_work(model: onnx.ModelProto, image_size: int) -> tuple[int, int]:
    """Operations in float32 and in 8 bits of a vision graph for one tile, by the shapes that its products have."""
    kinds = ("MatMul", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention")
    # The mean over queries is a sum that is written as a product, and no work of the model's.
    products = [node for node in model.graph.node if node.op_type in kinds and not node.output[0].endswith(".by_head")]
    wanted = dict.fromkeys(name for node in products for name in (*node.input[:3], node.output[0]) if name)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [name for name in wanted if name not in held]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    pixels = np.zeros((1, 3, image_size, image_size), np.float32)
    values = dict(zip(names, run(model, pixels), strict=True)) | held
    flops = dict.fromkeys(kinds, 0)
    for node in products:
        first, second = (values[name].shape for name in node.input[:2])
        if node.op_type == "MultiHeadAttention":
            flops[node.op_type] += 4 * first[1] * second[1] * first[2]
        else:
            flops[node.op_type] += 2 * values[node.output[0]].size * first[-1]
    in_8_bits = flops["MatMulIntegerToFloat"] + flops["MatMulNBits"]
    return flops["MatMul"] + flops["MultiHeadAttention"], in_8_bits


@pytest.mark.parametrize("name", ["exact_bundle", "unpruned_bundle", "int8_bundle"])
def test_a_vision_stage_is_the_products_of_its_graph(name: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    vision = bundle.manifest.vision
    num_kept = None if bundle.manifest.pruning is None else vision.capacity
    expected = vision_stage(make_config("tiny"), num_kept, INT8 if vision.precision == "int8" else FLOAT)
    found = graph_work(onnx.load(bundle.vision_file), vision.image_size)
    assert found == (expected.flops, expected.int8_ops)
    assert (found[1] > 0) == (name == "int8_bundle")


def test_the_published_sizes_of_clip_and_vicuna() -> None:
    config = make_config("7b")
    # ViT-L/14 at 336 px has 303.5 M parameters in all, of which 23 of 24 layers are run; 6.7 B are Vicuna's.
    assert vision_stage(config, None, Format(1, 1)).bytes == pytest.approx(290e6 + 21e6, rel=0.01)
    assert decode_step(config, 0, Format(1, 1)).bytes == pytest.approx(6.6e9, rel=0.01)
    assert prefill(config, 618, HALF).flops == pytest.approx(2 * 618 * 6.4e9, rel=0.02)


def test_fewer_tokens_are_less_work_at_the_same_weights() -> None:
    config = make_config("7b")
    whole, pruned = vision_stage(config, None, HALF), vision_stage(config, 192, HALF)
    assert pruned.flops < whole.flops
    assert pruned.bytes == whole.bytes


def test_rounding_moves_the_linear_layers_to_products_of_8_bits_and_nothing_else() -> None:
    config = make_config("7b")
    for whole, rounded in (
        (vision_stage(config, 192, FLOAT), vision_stage(config, 192, INT8)),
        (prefill(config, 234, FLOAT), prefill(config, 234, INT8)),
        (decode_step(config, 234, FLOAT), decode_step(config, 234, INT8)),
    ):
        assert whole.int8_ops == 0
        assert rounded.flops + rounded.int8_ops == whole.flops
        # What stays is attention and the patch embedding.
        assert 0 < rounded.flops < 0.15 * whole.flops


def test_a_floor_is_the_slower_of_arithmetic_and_memory_stage_by_stage() -> None:
    peaks = Peaks(flops_per_s=1000.0, int8_ops_per_s=4000.0, bytes_per_s=100.0)
    assert peaks.floor_ms(Work(10.0, 0.0, 0.5)) == 10.0
    assert peaks.floor_ms(Work(1.0, 0.0, 0.5)) == 5.0
    # Both kinds of products run on the same cores, one after the other.
    assert peaks.floor_ms(Work(10.0, 20.0, 0.5)) == 15.0
    assert peaks.floor_ms(Work(10.0, 0.0, 0.5), Work(0.0, 4.0, 0.5)) == 15.0
