"""Smoothing: the float model stays what it is, rounding to 8 bits costs less, and a wrong one is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import write_decoder
from hivtp.export.decoder.rounding.calibrate import calibrate
from hivtp.export.decoder.rounding.smoothing import Smoothing, smoothing_factors
from hivtp.export.verify.language import verify_language
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

OUTLIERS = (3, 17, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its norms, and some rows of `up_proj`, make channels that are far larger than the others."""
    from safetensors.torch import load_file, save_file

    text = {"initializer_range": 0.2, "num_hidden_layers": 3, "mlp_bias": True, "attention_bias": True}
    folder = make_checkpoint(tmp_path_factory.mktemp("outliers") / "checkpoint", text=text)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "language_model" not in name:
            continue
        if name.endswith("bias"):
            tensor.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
        if name.endswith(("layernorm.weight", "language_model.norm.weight", "model.norm.weight", "up_proj.weight")):
            tensor[list(OUTLIERS)] *= 4
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, list(OUTLIERS)] /= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def smoothing(checkpoint: Checkpoint) -> Smoothing:
    token_ids = np.random.default_rng(0).integers(512, size=(8, 64))
    found = calibrate(checkpoint, token_ids, block_size=None, is_smoothed=True)
    assert found.weights == {}
    assert found.smoothing is not None
    return found.smoothing


def test_the_float_model_computes_the_same(checkpoint: Checkpoint, smoothing: Smoothing) -> None:
    config = checkpoint.config.text_config
    model = LlamaForCausalLM(config).eval()
    state = {name: checkpoint.language_tensor(name).float() for name in model.state_dict()}
    token_ids = torch.from_numpy(np.random.default_rng(1).integers(512, size=(2, 30)))
    with torch.inference_mode():
        model.load_state_dict(state)
        expected = model(token_ids).logits
        smoothed = {name: smoothing.smoothed(name, weight) for name, weight in state.items()}
        model.load_state_dict(smoothed)
        found = model(token_ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    changed = {
        name.rpartition("layers.")[2] for name, weight in smoothed.items() if not torch.equal(weight, state[name])
    }
    assert {"1.input_layernorm.weight", "1.self_attn.q_proj.weight", "1.mlp.up_proj.bias", "lm_head.weight"} <= changed
    # The KV cache, which another decoder may read, holds what it held.
    assert not any("o_proj" in name or ("v_proj" in name and name.endswith("bias")) for name in changed)


def test_it_costs_less_and_no_operation(checkpoint: Checkpoint, smoothing: Smoothing, tmp_path: Path) -> None:
    from hivtp.export.decoder.rounding.calibrate import Calibration

    reports, kinds = [], []
    for name, given in (("plain", None), ("smoothed", smoothing)):
        calibration = None if given is None else Calibration(smoothing=given)
        file = write_decoder(checkpoint, tmp_path / name, "w8a8", calibration=calibration)
        reports.append(verify_language(checkpoint, file, "w8a8", smoothing=given))
        kinds.append(operations(file))
    plain, smoothed = reports
    assert smoothed["quantization_error"] < 0.7 * plain["quantization_error"]
    assert smoothed["median_quantization_error"] < 0.7 * plain["median_quantization_error"]
    assert smoothed["layers"]["errors"]["operation"] < 1e-5
    assert kinds[0] == kinds[1]


def operations(file: Path) -> list[tuple[str, str]]:
    import onnx

    return [(node.op_type, node.name) for node in onnx.load(file, load_external_data=False).graph.node]


def test_one_that_is_not_undone_is_refused(checkpoint: Checkpoint, smoothing: Smoothing, tmp_path: Path) -> None:
    from hivtp.export.decoder.rounding.calibrate import Calibration

    class Halved(Smoothing):
        """Forgets the rows of one matrix."""

        def smoothed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
            found = super().smoothed(name, weight)
            return found * 1.1 if name == "model.layers.1.mlp.gate_proj.weight" else found

    wrong: Any = Halved(smoothing.factors)
    file = write_decoder(checkpoint, tmp_path, "w8a8", calibration=Calibration(smoothing=wrong))
    with pytest.raises(VerificationError, match="in layer 1, smoothed output"):
        verify_language(checkpoint, file, "w8a8", smoothing=wrong)
    # And so is a decoder with another smoothing than the one that the check knows.
    with pytest.raises(VerificationError, match="the w8a8 decoder differs from PyTorch in layer"):
        verify_language(checkpoint, file, "w8a8")
    factors = {name: factor * 2 for name, factor in smoothing.factors.items()}
    with pytest.raises(VerificationError, match="the w8a8 decoder differs from PyTorch in layer"):
        verify_language(checkpoint, file, "w8a8", smoothing=replace(smoothing, factors=factors))


def test_factors_even_out_what_is_large_and_leave_silent_channels_alone() -> None:
    largest = torch.tensor([100.0, 1.0, 0.0])
    weights = [torch.tensor([[0.1, 1.0, 0.5]]), torch.tensor([[-0.2, 0.5, 0.0]])]
    factors = smoothing_factors(largest, weights)
    assert factors.isfinite().all()
    assert (factors > 0).all()
    assert factors[0] / factors[1] == pytest.approx(np.sqrt(100 / 0.2), rel=1e-4)
    assert LlamaConfig().rms_norm_eps > 0
