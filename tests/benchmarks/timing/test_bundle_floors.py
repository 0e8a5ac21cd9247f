from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest

from benchmarks.checkpoints import make_config
from benchmarks.timing.bundle_floors import Floors, decoder_format
from benchmarks.timing.floor import Format, Peaks, decode_step, prefill, vision_stage
from hivtp.engines.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

PEAKS = Peaks(flops_per_s=1e12, int8_ops_per_s=4e12, bytes_per_s=1e11)
INT8 = Format(1, 4, is_int8=True)


@pytest.fixture
def floors(tiny_checkpoint: Path) -> Floors:
    return Floors(tiny_checkpoint, PEAKS)


def test_a_floor_follows_tokens(floors: Floors, exact_bundle: Path, unpruned_bundle: Path) -> None:
    assert floors.vision_ms(exact_bundle, 2) < floors.vision_ms(unpruned_bundle, 2)
    assert floors.ttft_ms(exact_bundle, 21 + 40) < floors.ttft_ms(exact_bundle, 64 + 40)
    # The mean of the steps after 60 and 61 positions.
    both = [floors.decode_ms_per_token(exact_bundle, num_tokens, 2) for num_tokens in (60, 61)]
    assert floors.decode_ms_per_token(exact_bundle, 60, 3) == pytest.approx(sum(both) / 2)


def test_weights_of_8_and_4_bits_have_floors_by_their_own_rates(floors: Floors, int8_bundle: Path) -> None:
    config = make_config("tiny")
    int4 = decoder_format(int8_bundle / "language/decoder.onnx", "int4")
    # 4 bits, and a scale and a zero point for each 32 of them; a head of 8 bits; and blocks that are filled up.
    assert 0.64 < int4.weight_bytes < 1.1
    assert int4.is_int8
    vision_ms = PEAKS.floor_ms(vision_stage(config, 21, INT8))
    assert floors.vision_ms(int8_bundle) == vision_ms
    assert floors.ttft_ms(int8_bundle, 60) == vision_ms + PEAKS.floor_ms(prefill(config, 60, int4))
    step = decode_step(config, 60, int4)
    assert step.bytes / PEAKS.bytes_per_s > step.flops / PEAKS.flops_per_s + step.int8_ops / PEAKS.int8_ops_per_s
    assert floors.decode_ms_per_token(int8_bundle, 60, 2) == 1e3 * step.bytes / PEAKS.bytes_per_s


def test_a_prefill_decoder_runs_the_prompt_and_no_step(floors: Floors, prefill_bundle: Path) -> None:
    config = make_config("tiny")
    rounded = decoder_format(prefill_bundle / "language/prefill.onnx", "w8a8")
    # A scale for each output.
    assert 1 < rounded.weight_bytes < 1.1
    expected = PEAKS.floor_ms(vision_stage(config, None, Format(4, 4)), prefill(config, 60, rounded))
    assert floors.ttft_ms(prefill_bundle, 60) == pytest.approx(expected)
    assert floors.decode_ms_per_token(prefill_bundle, 60, 2) == PEAKS.floor_ms(decode_step(config, 60, Format(4, 4)))


def test_the_weights_of_a_step_are_those_that_lie_in_the_bundle(int8_bundle: Path) -> None:
    decoder = onnx.load(Bundle.open(int8_bundle).folder / "language/decoder.onnx")
    products = [node for node in decoder.graph.node if node.op_type == "MatMulNBits"]
    names = {name for node in products for name in node.input[1:]}
    held = sum(len(tensor.raw_data) for tensor in decoder.graph.initializer if tensor.name in names)
    precision = decoder_format(int8_bundle / "language/decoder.onnx", "int4")
    assert precision is not None
    assert decode_step(make_config("tiny"), 0, precision).bytes == pytest.approx(held)


def test_what_does_not_run_on_a_cpu_has_no_floor(prefill_bundle: Path) -> None:
    file = prefill_bundle / "language/decoder.onnx"
    assert decoder_format(file, "fp16") is decoder_format(file, "int4-fp16") is None
    assert decoder_format(file, "fp32") == Format(4, 4)
