"""Channels of a vision tower made more alike before they are rounded, without a change to what it computes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch

# By the name of a norm, the linear layers that take what it gives, the calibrated one first.
CONSUMERS: Mapping[str, tuple[str, ...]] = {
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}
# How much of the difference between channels moves from activations to weights.
STRENGTH = 0.5
# Below it a channel is as good as unused, and is left as it is.
MIN_SIZE = 1e-5
_NAME = re.compile(r"(?P<layer>vision\.encoder\.layers\.\d+\.)(?P<module>.+)\.(?P<kind>weight|bias)")


class SmoothedWeights:
    """Reads a tower's weights with its norms divided, channel by channel, and the products after them multiplied.

    Source: SmoothQuant (arXiv 2211.10438), section 4; the factors are folded into weights, so that nothing is added to
    the graph.

    Args:
        read_weight: returns a weight of the checkpoint by its name, [out, in] for a linear layer.
        maxima: by the name of a linear layer's weight the largest absolute value of each of its input channels.
    """

    def __init__(self, read_weight: Callable[[str], torch.Tensor], maxima: Mapping[str, np.ndarray]) -> None:
        self._read_weight = read_weight
        self._maxima = maxima
        self._factors: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """A weight by its name; float32 where it was changed."""
        weight, found = self._read_weight(name), _NAME.fullmatch(name)
        if found is None:
            return weight
        layer, module, kind = found["layer"], found["module"], found["kind"]
        if module in CONSUMERS and self._is_measured(layer, module):
            return weight.float() / self.factors(layer, module)
        norm = next((norm for norm, linears in CONSUMERS.items() if module in linears), None)
        if norm is None or kind == "bias" or not self._is_measured(layer, norm):
            return weight
        return weight.float() * self.factors(layer, norm)

    def _is_measured(self, layer: str, norm: str) -> bool:
        """A layer after the features runs where it scores, and is not calibrated."""
        return f"{layer}{CONSUMERS[norm][0]}.weight" in self._maxima

    def factors(self, layer: str, norm: str) -> torch.Tensor:
        """By which the channels of a norm are divided, [width] float32."""
        import torch

        key = layer + norm
        if key not in self._factors:
            linears = [f"{layer}{linear}.weight" for linear in CONSUMERS[norm]]
            weights = torch.stack([self._read_weight(linear).float().abs().amax(dim=0) for linear in linears]).amax(
                dim=0
            )
            activations = torch.from_numpy(self._maxima[linears[0]])
            sizes = activations**STRENGTH / weights.clamp(min=MIN_SIZE) ** (1 - STRENGTH)
            is_used = (activations > MIN_SIZE) & (weights > MIN_SIZE)
            self._factors[key] = torch.where(is_used, sizes, 1.0)
        return self._factors[key]
