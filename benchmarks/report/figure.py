"""A matplotlib figure without a window."""

from __future__ import annotations

from typing import Any

from hivtp_ops.errors import MissingExtraError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)
