"""Blocks of weights of 4 bits: their scales and zero points, and the form in which ONNX Runtime takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# Of 4 bits: the largest whole number, and the one of zero where there are no zero points.
MAX_WHOLE, MIDDLE = 15, 8
# Shares of a block's range that are tried as the range of its grid: what lies beyond is clipped, the rest is finer.
SHARES = tuple(1 - 0.04 * step for step in range(11))
# Weights whose grids are found at a time: what this many take stays in the cache of a processor.
CACHED_WEIGHTS = 2**18
# For a block of zeros, which would have a scale of zero.
MIN_SCALE = 1e-12


@dataclass(frozen=True)
class RoundedWeight:
    """A weight [out, in] in blocks of 4 bits along its inputs, as MatMulNBits takes it.

    Attributes:
        packed: [out, blocks, block size / 2] uint8, two whole numbers each, the lower half first.
        scales: [out, blocks] float32.
        zero_points: [out, (blocks + 1) / 2] uint8, packed alike.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    @classmethod
    def of(cls, whole: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, block_size: int) -> RoundedWeight:
        """Pack whole numbers [out, in], and [out, blocks] scales and zero points."""
        num_outputs, num_blocks = scales.shape
        # The last block may be cut short; the kernels multiply its rest by zero.
        blocks = np.zeros((num_outputs, num_blocks * block_size), np.uint8)
        blocks[:, : whole.shape[1]] = whole.numpy()
        even = np.zeros((num_outputs, num_blocks + num_blocks % 2), np.uint8)
        even[:, :num_blocks] = zero_points.numpy()
        packed = _pairs(blocks).reshape(num_outputs, num_blocks, block_size // 2)
        return cls(packed, scales.numpy().copy(), _pairs(even))


def stacked(parts: list[RoundedWeight]) -> RoundedWeight:
    """The outputs of several weights, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return RoundedWeight(
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zero_points for part in parts]),
    )


def best_grid(weight: torch.Tensor, importance: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of each block with the smallest error of rounding to the nearest.

    Args:
        weight: [out, in] float32.
        importance: [in], the mean square of each input.
        block_size: weights that share a scale.

    Returns:
        [out, blocks] float32 each; zero points are whole numbers.
    """
    import torch

    parts = torch.split(weight, max(1, CACHED_WEIGHTS // weight.shape[1]))
    scales, zeros = zip(*(_best_grid(part, importance, block_size) for part in parts), strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _best_grid(weight: torch.Tensor, importance: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    missing = -weight.shape[1] % block_size
    blocks = torch.nn.functional.pad(weight, (0, missing)).view(len(weight), -1, block_size)
    shares = torch.nn.functional.pad(importance, (0, missing)).view(-1, block_size)
    top, bottom = blocks.amax(-1).clamp(min=0), blocks.amin(-1).clamp(max=0)
    best_error = torch.full_like(top, torch.inf)
    best_scale, best_zero = torch.empty_like(top), torch.empty_like(top)
    for share in SHARES:
        scale = ((top - bottom) * (share / MAX_WHOLE)).clamp(min=MIN_SCALE)
        zero = (-bottom * share / scale).round_().clamp_(0, MAX_WHOLE)
        error = blocks / scale[..., None]
        error.add_(zero[..., None]).round_().clamp_(0, MAX_WHOLE).sub_(zero[..., None]).mul_(scale[..., None])
        error = error.sub_(blocks).square_().mul_(shares).sum(-1)
        is_better = error < best_error
        for known, found in ((best_error, error), (best_scale, scale), (best_zero, zero)):
            torch.where(is_better, found, known, out=known)
    return best_scale, best_zero


def _pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed: NDArray[Any] = values[:, ::2] | values[:, 1::2] << 4
    return packed
