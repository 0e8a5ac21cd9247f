from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.checkpoints import make_config, model_class
from benchmarks.timing.floor import Peaks, Work, decode_step, decoder_layer, encoder_layer, prefill, vision_stage
from hivtp.engines.bundle import Bundle
from hivtp.export.graph.clip import VisionShape

if TYPE_CHECKING:
    from pathlib import Path


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
    # transformers runs the layer behind it too.
    num_tokens = 1 + shape.num_patches
    beyond = encoder_layer(model.config).flops(num_tokens, num_tokens, num_tokens**2)
    assert shape.num_layers == shape.num_feature_layers + 1
    assert vision_stage(model.config, None, 4, num_tiles=2).flops == counted - 2 * beyond


def test_a_prefill_is_what_transformers_computes_less_what_nobody_reads(model: Any) -> None:
    length, text, layer = 37, model.config.text_config, decoder_layer(model.config)
    embeds = torch.zeros(3, length, text.hidden_size)
    counted = counted_flops(lambda: model(inputs_embeds=embeds, logits_to_keep=1))
    whole = layer.flops(length, length, length**2)
    # Eager attention computes all pairs and masks half of them; and transformers runs the last layer for all rows.
    causal = layer.flops(length, length, length * (length + 1) / 2)
    last = layer.flops(1, length, length)
    unread = (text.num_hidden_layers - 1) * (whole - causal) + whole - last
    assert prefill(model.config, length, 4, batch_size=3).flops == counted - 3 * unread


def test_a_step_is_what_transformers_computes(model: Any) -> None:
    from transformers import DynamicCache

    cache, hidden = DynamicCache(), model.config.text_config.hidden_size
    with torch.inference_mode():
        model(inputs_embeds=torch.zeros(2, 11, hidden), past_key_values=cache, use_cache=True)
    counted = counted_flops(lambda: model(inputs_embeds=torch.zeros(2, 1, hidden), past_key_values=cache))
    assert decode_step(model.config, 11, 4, batch_size=2).flops == counted


def test_the_bytes_are_those_of_all_matrices_and_of_the_kv_cache(model: Any) -> None:
    matrices = {name: weight.numel() for name, weight in model.named_parameters() if weight.dim() >= 2}
    embeddings = ("embed_tokens", "position_embedding")
    language = sum(
        num for name, num in matrices.items() if ("language" in name or "lm_head" in name) and embeddings[0] not in name
    )
    text = model.config.text_config
    by_position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert decode_step(model.config, 10, 4, batch_size=3).bytes == 4 * (language + 30 * by_position)
    assert prefill(model.config, 10, 2).bytes == 2 * (language + 10 * by_position)
    last = f"layers.{model.config.vision_config.num_hidden_layers - 1}."
    vision = sum(
        num
        for name, num in matrices.items()
        if ("vision_tower" in name or "projector" in name) and embeddings[1] not in name and last not in name
    )
    assert vision_stage(model.config, None, 2, num_tiles=5).bytes == 2 * vision


def graph_flops(file: Path, image_size: int) -> int:
    """Of the products of a vision graph for one tile, by the shapes that they have when it runs."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(file)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "MultiHeadAttention")]
    # The mean over queries is a sum that is written as a product, and no work of the model's.
    products = [node for node in products if not node.output[0].endswith(".by_head")]
    wanted = dict.fromkeys(name for node in products for name in (*node.input, *node.output))
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [name for name in wanted if name not in held]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    pixels = np.zeros((1, 3, image_size, image_size), np.float32)
    values = dict(zip(names, ReferenceEvaluator(model).run(None, {"pixel_values": pixels}), strict=True)) | held
    flops = 0
    for node in products:
        shapes = [values[name].shape for name in node.input]
        if node.op_type == "MatMul":
            flops += 2 * values[node.output[0]].size * shapes[0][-1]
        else:
            (_, num_queries, width), (_, num_keys, _), _ = shapes
            flops += 4 * num_queries * num_keys * width
    return flops


@pytest.mark.parametrize("name", ["exact_bundle", "unpruned_bundle"])
def test_a_vision_stage_is_the_products_of_its_graph(name: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    vision = bundle.manifest.vision
    num_kept = None if bundle.manifest.pruning is None else vision.capacity
    expected = vision_stage(make_config("tiny"), num_kept, 4).flops
    assert graph_flops(bundle.vision_file, vision.image_size) == expected


def test_the_published_sizes_of_clip_and_vicuna() -> None:
    config = make_config("7b")
    # ViT-L/14 at 336 px has 303.5 M parameters in all, of which 23 of 24 layers are run; 6.7 B are Vicuna's.
    assert vision_stage(config, None, 1).bytes == pytest.approx(290e6 + 21e6, rel=0.01)
    assert decode_step(config, 0, 1).bytes == pytest.approx(6.6e9, rel=0.01)
    assert prefill(config, 618, 2).flops == pytest.approx(2 * 618 * 6.4e9, rel=0.02)


def test_fewer_tokens_are_less_work_at_the_same_weights() -> None:
    config = make_config("7b")
    whole, pruned = vision_stage(config, None, 2), vision_stage(config, 192, 2)
    assert pruned.flops < whole.flops
    assert pruned.bytes == whole.bytes


def test_a_floor_is_the_slower_of_arithmetic_and_memory_stage_by_stage() -> None:
    peaks = Peaks(flops_per_s=1000.0, bytes_per_s=100.0)
    assert peaks.floor_ms(Work(10.0, 0.5)) == 10.0
    assert peaks.floor_ms(Work(1.0, 0.5)) == 5.0
    assert peaks.floor_ms(Work(10.0, 0.5), Work(1.0, 0.5)) == 15.0
