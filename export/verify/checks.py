"""How far results of a graph are from those of PyTorch, and the refusal of those that are too far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What to do about a graph that is beyond its tolerance.
ADVICE = "Choose a higher precision for this checkpoint"


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """||found - expected|| / ||expected||, in float64."""
    difference = np.linalg.norm(found.astype(np.float64).ravel() - expected.astype(np.float64).ravel())
    return float(difference / np.linalg.norm(expected.astype(np.float64).ravel()))


def row_errors(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """The relative error of each row along the last axis; rows that are zero on both sides are left out."""
    expected = expected.astype(np.float64).reshape(-1, expected.shape[-1])
    difference = np.linalg.norm(found.astype(np.float64).reshape(expected.shape) - expected, axis=1)
    size = np.linalg.norm(expected, axis=1)
    is_zero = (size == 0) & (difference == 0)
    errors: NDArray[np.float64] = difference[~is_zero] / np.maximum(size[~is_zero], np.finfo(np.float64).tiny)
    return errors


def jaccard(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """|A ∩ B| / |A ∪ B| of two [tiles, capacity] kept sets, padding (-1) left out."""
    pairs = [
        {(tile, index) for tile, row in enumerate(kept.tolist()) for index in row if index >= 0}
        for kept in (first, second)
    ]
    return len(pairs[0] & pairs[1]) / max(1, len(pairs[0] | pairs[1]))


def refuse(
    subject: str,
    checks: list[tuple[str, float | None, str, float | None]],
    reference: str = "PyTorch",
    advice: str = ADVICE,
) -> None:
    """Refuse a graph that is beyond a tolerance.

    Args:
        subject: the graph.
        checks: name, value found or None, "at most" or "at least", and the limit or None, of each.
        reference: what it was compared with.
        advice: what to do.

    Raises:
        VerificationError: a value is beyond its limit.
    """
    for name, found, bound, limit in checks:
        if found is None or limit is None:
            continue
        # Written so that NaN is refused too.
        is_within = found <= limit if bound == "at most" else found >= limit
        if not is_within:
            raise VerificationError(
                f"{subject} differs from {reference}: its {name} is {found:.3g}, allowed is {bound} {limit:.3g}; "
                f"nothing was written. {advice}"
            )
