"""Weights of linear layers in 8 bits, as numbers: no graph is needed here."""

from __future__ import annotations

import numpy as np

# The largest number of FLOAT8E4M3FN.
MAX_FP8 = 448.0
# The smallest scale that float16 holds to half a percent.
MIN_FP8_SCALE = 2.0**-17
# The largest whole number of 8 bits with a sign, of which the same is used on both sides of zero.
MAX_INT8 = 127
# What stands for zero where whole numbers of 8 bits have no sign.
ZERO_POINT = 128


def quantize_per_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a linear layer's weight symmetrically per output channel.

    Args:
        weight: [out, in] float32.

    Returns:
        The int8 matrix [in, out] and its scales [out] float32, with weight.T ≈ matrix * scales.
    """
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / MAX_INT8
    matrix = np.rint(weight / scale[:, None]).astype(np.int8).T
    return np.ascontiguousarray(matrix), scale.astype(np.float32)


def quantize_in_blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a linear layer's weight symmetrically in blocks of inputs.

    Args:
        weight: [out, in] float32.
        block_size: inputs that share a scale; the last block is filled up with zeros.

    Returns:
        The blocks [out, blocks, block_size] uint8 and their scales [out, blocks] float32, with
        weight ≈ (blocks - ZERO_POINT) * scales.
    """
    num_outputs, num_inputs = weight.shape
    num_blocks = -(-num_inputs // block_size)
    padded = np.zeros((num_outputs, num_blocks * block_size), np.float32)
    padded[:, :num_inputs] = weight
    values = padded.reshape(num_outputs, num_blocks, block_size)
    scale = np.maximum(np.abs(values).max(axis=2), np.finfo(np.float32).tiny) / MAX_INT8
    blocks = np.rint(values / scale[:, :, None]) + ZERO_POINT
    return blocks.astype(np.uint8), scale.astype(np.float32)


def fp8_scale(maximum: float) -> np.ndarray:
    """The scale [] float16 by which values up to a maximum fill fp8."""
    return np.array(max(maximum / MAX_FP8, MIN_FP8_SCALE), np.float16)


def quantize_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a linear layer's weight to fp8 with one scale.

    Args:
        weight: [out, in] float32.

    Returns:
        The matrix [in, out] float8_e4m3fn and its scale [] float16, with weight.T ≈ matrix * scale.
    """
    import onnx_ir as ir

    scale = fp8_scale(float(np.abs(weight).max()))
    # float16 may have rounded the scale down, and fp8 has no infinity to overflow to.
    matrix = np.clip(weight.T / scale.astype(np.float32), -MAX_FP8, MAX_FP8)
    return np.ascontiguousarray(matrix.astype(ir.DataType.FLOAT8E4M3FN.numpy())), scale
