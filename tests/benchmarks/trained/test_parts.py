from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.trained.checkpoint import projector_weights, write_checkpoint
from benchmarks.trained.packages import file_of, photographs, prose, text, vision_file
from benchmarks.trained.smollm2 import rotated_in_halves
from benchmarks.trained.tower import EMBEDDING_SCALE, RESIDUAL_SCALE, WIDTH, clip_config, pre_norm_weight
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path


def test_the_norm_before_the_layers_only_subtracts_the_mean_of_each_token() -> None:
    torch = pytest.importorskip("torch")
    # Tokens of the trained tower have variances up to 0.02.
    tokens = (
        torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.03, 0.15, 50)[:, None]
    )
    weight = torch.tensor(pre_norm_weight(), dtype=torch.float32)
    normed = torch.nn.functional.layer_norm(
        tokens * EMBEDDING_SCALE, (WIDTH,), weight, eps=clip_config(336)["layer_norm_eps"]
    )
    expected = RESIDUAL_SCALE * (tokens - tokens.mean(dim=1, keepdim=True))
    torch.testing.assert_close(normed, expected, rtol=5e-4, atol=1e-4)


def test_the_projector_does_not_see_the_mean_of_a_token() -> None:
    torch = pytest.importorskip("torch")
    weight = projector_weights(64)["linear_1.weight"]
    features = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)) * RESIDUAL_SCALE
    torch.testing.assert_close(features @ weight.T, (features + 300) @ weight.T, rtol=1e-3, atol=1e-3)


def test_queries_and_keys_of_either_order_rotate_alike() -> None:
    rng = np.random.default_rng(0)
    num_heads, size, hidden = 2, 8, 5
    weight, x = rng.normal(size=(num_heads * size, hidden)).astype(np.float32), rng.normal(size=hidden)
    angles = rng.normal(size=size // 2)
    pairs = (weight @ x).reshape(num_heads, size // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    halves = (rotated_in_halves(weight, num_heads) @ x).reshape(num_heads, 2, size // 2)
    np.testing.assert_allclose((halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angles), turned, rtol=1e-5)


def test_prose_is_paragraphs_of_sentences() -> None:
    page = "Title\n-----\n\nA sentence\nof two lines.\n\n==== ====\nA table.\n\n>>> code\n\nAnother one.\n\nno start."
    assert prose(page) == "A sentence of two lines.\nAnother one."


def test_a_missing_package_is_named_with_its_extra() -> None:
    for package, path in (("no_such_package", "file"), ("json", "no_such_file")):
        with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*hivtp\[trained\]"):
            file_of(package, path)


def test_photographs_and_text_are_there() -> None:
    for package in ("skimage", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    assert len({file.name for file in photographs()}) == 21
    assert text().count(".") > 50


def test_the_tower_is_the_one_that_the_package_ships(tmp_path: Path) -> None:
    """At 224 px, which the package's own graph takes; both end in the last norm."""
    try:
        file = vision_file()
        checkpoint_folder = write_checkpoint(tmp_path / "checkpoint", 224)
    except MissingExtraError as error:
        pytest.skip(str(error))
    torch, onnx, onnxruntime = (importlib.import_module(name) for name in ("torch", "onnx", "onnxruntime"))
    from transformers import CLIPVisionModel

    from benchmarks.trained.tower import clip_weights

    config = importlib.import_module("transformers").CLIPVisionConfig(**clip_config(224))
    tower = CLIPVisionModel(config).eval()
    body = getattr(tower, "vision_model", tower)
    body.load_state_dict(clip_weights(file, 224), strict=False)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = body.post_layernorm(body(pixels, output_hidden_states=True).hidden_states[-1]).numpy()
    graph, output = onnx.load(file), "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=output))
    [theirs] = onnxruntime.InferenceSession(graph.SerializeToString()).run([output], {"input_image": pixels.numpy()})
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    assert (checkpoint_folder / "model.safetensors").stat().st_size > 6e8
