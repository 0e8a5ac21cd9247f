"""The decoder: the language model as ONNX Runtime GenAI's model builder writes it, and its token embeddings."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hivtp.export.decoder.last_position import cut_to_last_position
from hivtp.export.decoder.model_builder import BUILDER_OPTIONS, builder_class, builder_config
from hivtp.export.decoder.w8a8 import quantize_products
from hivtp.export.decoder.weight_only import WeightOnlySettings, quantize_weights
from hivtp.export.graph.builder import save_model
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.decoder.rounding.calibrate import Calibration

DecoderPrecision = Literal["fp32", "int8", "int4", "w8a8", "fp16", "int4-fp16"]
# What a second decoder for prompts may compute in.
PrefillPrecision = Literal["w8a8"]
# How weights are rounded: to the nearest, or as a text says; see `rounding.calibrate`.
Rounding = Literal["plain", "calibrated"]
DEFAULT_ROUNDING: Rounding = "calibrated"
NUM_BITS = {"int8": 8, "int4": 4, "int4-fp16": 4}
ROUNDED_PRECISIONS = {*NUM_BITS, "w8a8"}
# Those that a text can calibrate: weights of 4 bits by GPTQ, activations of 8 by smoothing.
GPTQ_PRECISIONS = ("int4", "int4-fp16")
SMOOTHED_PRECISIONS = ("w8a8",)
CALIBRATED_PRECISIONS = (*GPTQ_PRECISIONS, *SMOOTHED_PRECISIONS)
# Made for a GPU: ONNX Runtime's attention there computes in half precision only.
HALF_PRECISIONS = ("fp16", "int4-fp16")
# Weights that share a scale. Larger blocks round more coarsely, and leave the kernels less to do besides multiplying.
BLOCK_SIZES = (16, 32, 64, 128, 256)
DEFAULT_BLOCK_SIZE = 32
DECODER_NAME = "decoder.onnx"
PREFILL_NAME = "prefill.onnx"
EMBEDDINGS_NAME = "embeddings.npy"


@dataclass(frozen=True)
class DecoderKind:
    """Which decoder a bundle holds.

    Attributes:
        precision: see write_decoder.
        block_size: of write_decoder; None where weights are not rounded in blocks.
        prefill_precision: of a second decoder, which runs the prompts; None where one decoder runs all.
        rounding: of both; None where nothing is rounded that a text could calibrate.
    """

    precision: DecoderPrecision
    block_size: int | None = None
    prefill_precision: PrefillPrecision | None = None
    rounding: Rounding | None = None

    @property
    def is_smoothed(self) -> bool:
        """Whether a calibration smooths activations."""
        return self.rounding == "calibrated" and not {self.precision, self.prefill_precision}.isdisjoint(
            SMOOTHED_PRECISIONS
        )

    @property
    def gptq_block_size(self) -> int | None:
        """The blocks of weights that a calibration rounds; None where it rounds none."""
        is_wanted = self.rounding == "calibrated" and self.precision in GPTQ_PRECISIONS
        return (self.block_size or DEFAULT_BLOCK_SIZE) if is_wanted else None


def write_decoder(
    checkpoint: Checkpoint,
    folder: Path,
    precision: DecoderPrecision,
    on_weight: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    block_size: int | None = None,
    name: str = DECODER_NAME,
    calibration: Calibration | None = None,
) -> Path:
    """Write a decoder and its weights: embeddings and KV cache in, logits of the last position out.

    The builder gets the checkpoint's memory-mapped weights, so no copy of the language model is made.

    Args:
        checkpoint: an open checkpoint; only its language weights are read.
        folder: where to write; made if absent.
        precision: for a CPU "fp32"; or "int8" or "int4": weights of 8 or 4 bits in blocks (activations become
            int8 in the kernels), all else in float32; or "w8a8": see quantize_products. For a GPU "fp16", or
            "int4-fp16": weights of 4 bits, all else in float16: inputs, outputs, KV cache.
        on_weight: called with (weights done, all weights).
        block_size: weights in a block, one of BLOCK_SIZES; None for DEFAULT_BLOCK_SIZE.
        name: of the file; the weights lie beside it.
        calibration: how to round, with the same block size; None rounds to the nearest.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
        CheckpointError: the builder refuses the language model.
    """
    builder = builder_class(checkpoint.config.text_config.model_type)
    import onnx_ir as ir

    folder.mkdir(parents=True, exist_ok=True)
    config = builder_config(checkpoint)
    is_half = precision in HALF_PRECISIONS
    dtype, provider = (ir.DataType.FLOAT16, "cuda") if is_half else (ir.DataType.FLOAT, "cpu")
    try:
        with tempfile.TemporaryDirectory() as cache, _silenced():
            # Built without rounding and quantised by us afterwards: the builder would hold all weights in memory.
            decoder = builder(config, dtype, dtype, provider, cache, {**BUILDER_OPTIONS, "filename": DECODER_NAME})
            decoder.loaded_model = load_language_model(checkpoint)
            decoder.make_model("")
            del decoder.loaded_model
    except (NotImplementedError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"ONNX Runtime GenAI's model builder cannot build the language model of {checkpoint.folder}: {error}"
        ) from error
    cut_to_last_position(decoder.model)
    decoder.model.graph.sort()
    file = folder / name
    if precision not in ROUNDED_PRECISIONS:
        save_model(decoder.model, file, on_weight)
        return file
    if precision == "w8a8":
        smoothing = None if calibration is None else calibration.smoothing
        quantize_products(decoder.model, on_weight, smoothing, checkpoint.config.text_config)
    else:
        settings = WeightOnlySettings(
            NUM_BITS[precision], block_size or DEFAULT_BLOCK_SIZE, accuracy_level=0 if is_half else 4
        )
        rounded = None if calibration is None or precision not in GPTQ_PRECISIONS else calibration.weights
        with _silenced():
            quantize_weights(decoder.model, settings, on_weight, rounded)
    save_model(decoder.model, file)
    # Now, not when the garbage collector comes: another decoder may be written next.
    for weight in decoder.model.graph.initializers.values():
        weight.const_value = None
    return file


def decoder_dtype(precision: str) -> Literal["float32", "float16"]:
    """What a decoder takes and gives, and what its KV cache holds."""
    return "float16" if precision in HALF_PRECISIONS else "float32"


def write_embeddings(checkpoint: Checkpoint, folder: Path, precision: DecoderPrecision = "fp32") -> Path:
    """Write the token embeddings [vocab, hidden] as .npy, for a decoder of some precision.

    They are float16 where the checkpoint or the decoder is, else float32.

    Raises:
        CheckpointError: they are beyond the range of float16.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    table = checkpoint.tensor("language.model.embed_tokens.weight")
    if decoder_dtype(precision) == "float16":
        table = table.half()
        if not table.isfinite().all():
            raise CheckpointError(
                f"the token embeddings of {checkpoint.folder} are beyond the range of float16; choose a "
                "language precision for a CPU"
            )
    elif table.dtype != torch.float16:
        # numpy has no bfloat16, and float16 has not its range.
        table = table.float()
    file = folder / EMBEDDINGS_NAME
    np.save(file, table.numpy(), allow_pickle=False)
    return file


def load_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The causal language model over the checkpoint's memory-mapped weights, in their stored dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(checkpoint.config.text_config)
    weights = {name: checkpoint.language_tensor(name) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Hold back what the builder and the quantizer print and log for every layer."""
    quantizer_log = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = quantizer_log.level
    quantizer_log.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        quantizer_log.setLevel(level)
