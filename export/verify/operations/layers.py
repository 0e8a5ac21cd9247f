"""How far the operations of a graph may be from those of transformers, each on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.export.verify.checks import ADVICE
from hivtp.export.verify.operations.steering import worst
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hivtp.export.verify.operations.steering import Comparison


@dataclass(frozen=True)
class LayerTolerance:
    """The largest relative error that one row of a value may have, see Kind; the same at every depth.

    A wrong layer, head, position or bias makes errors of about 1. What remains for a right one is what the precision
    computes with: float32, float16, or weights and inputs that are rounded to 8 or 4 bits.
    """

    operation: float
    product: float
    blocks: float = 0.0
    rounding: float = 0.0
    weights: float = 0.0


def check_layers(
    subject: str, found: Iterable[Comparison], tolerance: LayerTolerance, advice: str = ADVICE
) -> dict[str, Any]:
    """Refuse a graph with an operation that computes something else.

    Args:
        subject: the graph, for messages.
        found: the comparisons.
        tolerance: of the graph's precision.
        advice: what to do.

    Returns:
        The largest error of each kind, and the tolerance, for the manifest.

    Raises:
        VerificationError: an error is beyond the tolerance, or not a number.
    """
    largest = worst(found)
    for kind, comparison in largest.items():
        limit: float = getattr(tolerance, kind)
        if not comparison.error <= limit:
            raise VerificationError(
                f"{subject} differs from PyTorch in {comparison.place}: the {kind} error is {comparison.error:.3g}, "
                f"allowed is at most {limit:.3g}; nothing was written. {advice}"
            )
    return {
        "errors": {kind: comparison.error for kind, comparison in largest.items()},
        "tolerance": {kind: getattr(tolerance, kind) for kind in largest},
    }
