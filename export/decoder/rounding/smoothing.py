"""Smoothing: channels that are large are divided by a factor, and the weights that multiply them get it instead.

The float graph computes the same as before; activations that are rounded to 8 bits lose less. The factors go into what
stands before a product: the gain of a norm, or the rows of `up_proj` for `down_proj`. So no operation is added.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equation 4. Values are left as they are: the KV cache holds them,
and a decoder of another precision may read them there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

# How much of the size of activations moves into the weights; the paper's.
STRENGTH = 0.5
# Channels that the text left at zero are not made larger without bound.
MIN_SIZE = 1e-5
# The linear maps that take what a norm, or the product of the gate and `up_proj`, gives, within a layer.
TAKERS: Mapping[str, Sequence[str]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Smoothing:
    """Factors by which channels are divided.

    Attributes:
        factors: [channels] float32 by the module, within the causal language model, whose outputs are divided.
    """

    factors: Mapping[str, torch.Tensor]

    def smoothed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight or bias, by its name in the causal language model, as the smoothed model has it: a new tensor."""
        module, _, kind = name.rpartition(".")
        weight = weight.float()
        giver = _giver(module)
        if kind == "weight" and giver is not None and giver in self.factors:
            weight = weight * self.factors[giver]
        if module in self.factors:
            divisor = self.factors[module]
            weight = weight / (divisor if weight.dim() == 1 else divisor[:, None])
        return weight


def smoothing_factors(largest: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The factors [channels] for activations and the weights that multiply them.

    Args:
        largest: [channels] float32, the largest size of each.
        weights: [out, channels] each.
    """
    import torch

    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    factors = largest.clamp(min=MIN_SIZE) ** STRENGTH / columns.clamp(min=MIN_SIZE) ** (1 - STRENGTH)
    # A common factor changes nothing; near one, the smoothed weights keep their order of magnitude.
    return factors / factors.log().mean().exp()


def _giver(module: str) -> str | None:
    """The module whose outputs a linear map takes, where smoothing divides them."""
    if module == "lm_head":
        return "model.norm"
    for giver, takers in TAKERS.items():
        for taker in takers:
            if module.endswith(f".{taker}"):
                return module.removesuffix(taker) + giver
    return None
