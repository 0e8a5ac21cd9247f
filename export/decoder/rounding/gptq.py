"""GPTQ: weights rounded one input after the other, each error made good by the weights that are not rounded yet.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1. Inputs are taken in the order of their size, and every
block keeps the grid that it has in place (act-order with static groups, as in AutoGPTQ).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.export.decoder.rounding.grid import MAX_WHOLE, RoundedWeight, best_grid

if TYPE_CHECKING:
    import torch

# Of the mean diagonal, added to each: what a text does not show of the inputs must not be made good by large weights.
DAMPING = 0.01
# Of a triangle that is inverted as it is; larger ones are inverted in parts, in products of matrices.
SMALL_TRIANGLE = 512
# Inputs whose errors reach the others in one product of matrices.
CHUNK = 128


def inverse_factor(moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The upper triangular U with U^T U = (moments + damping)^-1, [in, in].

    Args:
        moments: [in, in] float32, the mean of the products of inputs; it is overwritten.
        damping: see DAMPING.
    """
    import torch

    diagonal = moments.diagonal()
    # An input that is always zero moves nothing: it only has to be invertible.
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal += damping * diagonal.mean()
    # With its order turned round, the lower factor is the upper one; and the inverse of that is the factor of the
    # inverse, which is then never made.
    return _inverse(torch.linalg.cholesky(moments.flip(0, 1))).flip(0, 1)


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix; half of the time of solving for the identity."""
    import torch

    if len(lower) <= SMALL_TRIANGLE:
        solved: torch.Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
        return solved
    middle = len(lower) // 2
    first, last = _inverse(lower[:middle, :middle]), _inverse(lower[middle:, middle:])
    found = torch.zeros_like(lower)
    found[:middle, :middle], found[middle:, middle:] = first, last
    found[middle:, :middle] = -(last @ lower[middle:, :middle] @ first)
    return found


def round_weights(
    weights: list[torch.Tensor], moments: list[torch.Tensor], block_size: int
) -> list[tuple[RoundedWeight, torch.Tensor]]:
    """Round weights of the same inputs so that their outputs, and not their values, stay close.

    Args:
        weights: [out, in] float32 each.
        moments: [part, part] float32, the mean of the products of their inputs, for one part of them after the other;
            an error is made good within its part. Parts hold whole blocks.
        block_size: weights that share a scale.

    Returns:
        For each the rounded weight, and its values [out, in] float32.
    """
    import torch

    sizes = [len(part) for part in moments]
    parts = [torch.split(weight, sizes, dim=1) for weight in weights]
    rounded: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in weights]
    for place, part in enumerate(moments):
        importance = part.diagonal().clone()
        order = importance.argsort(descending=True)
        factor = inverse_factor(part[order][:, order])
        for found, split in zip(rounded, parts, strict=True):
            found.append(_round(split[place], importance, order, factor, block_size))
    results = []
    for found in rounded:
        whole, scales, zeros, values = (torch.cat(pieces, dim=1) for pieces in zip(*found, strict=True))
        results.append((RoundedWeight.of(whole, scales, zeros, block_size), values))
    return results


def _round(
    weight: torch.Tensor, importance: torch.Tensor, order: torch.Tensor, factor: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, ...]:
    """Whole numbers [out, in], scales and zero points [out, blocks], and values [out, in]."""
    import torch

    scales, zeros = best_grid(weight, importance, block_size)
    block_of = order // block_size
    # Inputs are rows from here on, so that each lies in one piece of memory.
    left, whole = weight.T[order].contiguous(), torch.empty(weight.T.shape, dtype=torch.uint8)
    rounded = torch.empty_like(left)
    scale_rows, zero_rows = scales.T.contiguous(), zeros.T.contiguous()
    for start in range(0, len(left), CHUNK):
        stop = min(start + CHUNK, len(left))
        chunk, errors = left[start:stop], torch.empty(stop - start, left.shape[1])
        for row, (index, block) in enumerate(
            zip(order[start:stop].tolist(), block_of[start:stop].tolist(), strict=True)
        ):
            scale, zero = scale_rows[block], zero_rows[block]
            number = (chunk[row] / scale).add_(zero).round_().clamp_(0, MAX_WHOLE)
            whole[index] = number.to(torch.uint8)
            torch.mul(number.sub_(zero), scale, out=rounded[index])
            torch.sub(chunk[row], rounded[index], out=errors[row])
            errors[row] /= factor[start + row, start + row]
            chunk[row + 1 :].addr_(factor[start + row, start + row + 1 : stop], errors[row], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return whole.T, scales, zeros, rounded.T
