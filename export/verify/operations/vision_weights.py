"""The weights that a written vision graph computes with, dequantised, under the names of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class VisionWeights:
    """Reads the rounded weights of a vision graph.

    Args:
        file: the graph.
    """

    def __init__(self, file: Path) -> None:
        import onnx_ir as ir

        self._initializers = ir.load(file).graph.initializers

    def rounded(self, name: str) -> torch.Tensor | None:
        """A weight [out, in] float32 by its canonical name; None where the graph does not round it to 8 bits."""
        import torch

        for kind in ("int8", "fp8"):
            stored = self._initializers.get(f"{name}.{kind}")
            if stored is not None and stored.const_value is not None:
                scale = self._initializers[f"{name}.scale"].const_value
                assert scale is not None, "a rounded weight has a scale"
                weight = stored.const_value.numpy().astype(np.float32) * scale.numpy().astype(np.float32)
                return torch.from_numpy(np.ascontiguousarray(weight.T))
        return None
