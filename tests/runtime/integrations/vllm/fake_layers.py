"""vLLM's CLIP layers on the weights of transformers' layers, with all heads or with those of one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Sum = Callable[[torch.Tensor], torch.Tensor]


class FakeAttention:
    """What the plugin uses of vLLM's `CLIPAttention`: `qkv_proj` of the rank's heads, and `out_proj`, which sums.

    Args:
        attention: of transformers.
        rank, num_ranks: which part of the heads this is.
        sum_over_ranks: as vLLM's all-reduce.
    """

    def __init__(self, attention: Any, rank: int, num_ranks: int, sum_over_ranks: Sum) -> None:
        self.head_dim, self.scale, self.tp_size = attention.head_dim, attention.scale, num_ranks
        width = attention.q_proj.out_features // num_ranks
        self._part = slice(rank * width, (rank + 1) * width)
        self._attention = attention
        self._rank = rank
        self._sum = sum_over_ranks

    def qkv_proj(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        projections = self._attention.q_proj, self._attention.k_proj, self._attention.v_proj
        return torch.cat([project(hidden)[..., self._part] for project in projections], dim=-1), None

    def out_proj(self, mixed: torch.Tensor) -> tuple[torch.Tensor, None]:
        projection = self._attention.out_proj
        partial = mixed @ projection.weight[:, self._part].T
        if self._rank == 0:
            partial = partial + projection.bias
        return self._sum(partial), None


def fake_tower(tower: Any, rank: int = 0, num_ranks: int = 1, sum_over_ranks: Sum = lambda tensor: tensor) -> Any:
    """vLLM's tower of a `CLIPVisionModel` of transformers; its projections may be split among ranks."""

    def layer(own: Any) -> Any:
        attention = FakeAttention(own.self_attn, rank, num_ranks, sum_over_ranks)

        class Layer:
            self_attn = attention
            layer_norm1, layer_norm2, mlp = own.layer_norm1, own.layer_norm2, own.mlp

            def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
                return own(hidden, attention_mask=None)

        return Layer()

    layers = [layer(own) for own in tower.encoder.layers]
    inner = SimpleNamespace(
        config=tower.config,
        embeddings=tower.embeddings,
        pre_layrnorm=tower.pre_layrnorm,
        encoder=SimpleNamespace(layers=layers),
    )
    return SimpleNamespace(vision_model=inner)
