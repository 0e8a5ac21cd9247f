from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import write_decoder
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.verify import checks as verification
from hivtp.export.verify.checks import jaccard, relative_error, sample_pixels, verify_language, verify_vision
from hivtp_ops import PruningSpec
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

SPEC = PruningSpec().resolve(6)


def damage(file: Path, name: str, factor: float) -> None:
    """Scale one weight of a written graph."""
    model = onnx.load(file)
    [weight] = [item for item in model.graph.initializer if item.name == name]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))
    onnx.save(model, file)


@pytest.mark.parametrize("weight", ["projector.linear_2.weight.T", "vision.encoder.layers.2.self_attn.q_proj.weight.T"])
def test_a_wrong_weight_is_refused(tiny_checkpoint: Path, tmp_path: Path, weight: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    file = tmp_path / "model.onnx"
    save_model(build_vision_graph(checkpoint, SPEC, "fp32"), file)
    verify_vision(checkpoint, SPEC, file, "fp32", "vision")
    damage(file, weight, 1.001)
    with pytest.raises(VerificationError, match="vision graph differs from PyTorch"):
        verify_vision(checkpoint, SPEC, file, "fp32", "vision")


def test_nan_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    file = tmp_path / "model.onnx"
    save_model(build_vision_graph(checkpoint, None, "fp32"), file)
    damage(file, "projector.linear_2.weight.T", float("nan"))
    with pytest.raises(VerificationError, match="relative error is nan"):
        verify_vision(checkpoint, None, file, "fp32", "vision")


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_rounded_graph_beyond_its_tolerance_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    file = tmp_path / "model.onnx"
    save_model(build_vision_graph(checkpoint, SPEC, precision), file)
    report = verify_vision(checkpoint, SPEC, file, precision, "vision")
    assert 0.8 <= report["kept_jaccard"] <= 1
    assert 1e-3 < report["relative_error"] <= report["tolerance"]["relative_error"]
    strict = {precision: verification.VisionTolerance(1.0, 1.0, 1.01)}
    monkeypatch.setattr(verification, "VISION_TOLERANCES", strict)
    with pytest.raises(VerificationError, match=r"kept-token agreement is .*, allowed is at least 1\.01"):
        verify_vision(checkpoint, SPEC, file, precision, "vision")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_wrong_decoder_is_refused(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    file = write_decoder(checkpoint, tmp_path, precision)
    verify_language(checkpoint, file, precision)
    damage(file, "model.layers.1.post_attention_layernorm.weight", 3.0)
    with pytest.raises(VerificationError, match=f"the {precision} decoder"):
        verify_language(checkpoint, file, precision)


def test_sample_pixels_are_the_same_at_every_call_and_have_no_ties() -> None:
    first, second = sample_pixels(2, 64), sample_pixels(2, 64)
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float32
    assert not np.array_equal(first[0], first[1])
    patches = first.reshape(2, 3, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(128, -1)
    assert len(np.unique(patches, axis=0)) == 128


def test_jaccard_and_relative_error_of_known_values() -> None:
    assert jaccard(np.array([[0, 1, 2, -1]]), np.array([[1, 2, 3, -1]])) == 0.5
    assert jaccard(np.array([[0], [1]]), np.array([[1], [0]])) == 0.0
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 5.0])) == pytest.approx(np.sqrt(10) / 5)
