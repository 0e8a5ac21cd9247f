"""A text read by the language model, layer by layer: what it shows of the inputs of each product guides rounding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hivtp.export.decoder.language_layers import LanguageLayers
from hivtp.export.decoder.names import product_name
from hivtp.export.decoder.rounding.gptq import round_weights
from hivtp.export.decoder.rounding.inputs import LinearInputs
from hivtp.export.decoder.rounding.smoothing import Smoothing, smoothing_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.decoder.rounding.grid import RoundedWeight

# Positions that a layer computes at a time, which bounds its memory.
MAX_POSITIONS = 1024
# By the linear map whose inputs are watched: the nodes that multiply the same, each with its weights stacked.
PRODUCTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "self_attn.q_proj": {"attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    "self_attn.o_proj": {"attn/o_proj": ("self_attn.o_proj",)},
    "mlp.gate_proj": {"mlp/gate_proj": ("mlp.gate_proj",), "mlp/up_proj": ("mlp.up_proj",)},
    "mlp.down_proj": {"mlp/down_proj": ("mlp.down_proj",)},
}
# By the module that smoothing divides: the linear map whose inputs then are smaller.
SMOOTHED: Mapping[str, str] = {
    "input_layernorm": "self_attn.q_proj",
    "post_attention_layernorm": "mlp.gate_proj",
    "mlp.up_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class Calibration:
    """How a text says that a decoder should be rounded.

    Attributes:
        weights: in 4 bits, by the node that multiplies by them; empty where none were asked for.
        smoothing: None where none was asked for.
    """

    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    smoothing: Smoothing | None = None


def calibrate(
    checkpoint: Checkpoint,
    token_ids: NDArray[Any],
    *,
    block_size: int | None,
    is_smoothed: bool,
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibration:
    """Read a text with the checkpoint's weights, one layer in memory at a time, and round by what is seen.

    Every layer takes what the unrounded layers before it give: one pass then serves all that is rounded.

    Args:
        checkpoint: an open checkpoint; only its language weights are read.
        token_ids: [sequences, length].
        block_size: of weights in 4 bits, which GPTQ rounds; None rounds none.
        is_smoothed: whether to find factors for activations in 8 bits.
        on_layer: called with (layers done, all layers).
    """
    import torch

    config = checkpoint.config.text_config
    layers = LanguageLayers(config, checkpoint.language_tensor)
    weights: dict[str, RoundedWeight] = {}
    factors: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        states = checkpoint.language_tensor("model.embed_tokens.weight")[torch.from_numpy(token_ids)].float()
        length = states.shape[1]
        places = layers.places(length)
        for index in range(len(layers)):
            with layers.layer(index) as layer:
                modules = dict(layer.named_modules())
                with LinearInputs({name: modules[name] for name in PRODUCTS}, has_moments=bool(block_size)) as seen:
                    parts = torch.split(states, max(1, MAX_POSITIONS // length))
                    states = torch.cat([layer(part, **places) for part in parts])
                if block_size is not None:
                    for path, weight in _rounded(modules, seen, block_size):
                        weights[product_name(index, path)] = weight
                for giver, watched in SMOOTHED.items() if is_smoothed else ():
                    takers = [modules[name].weight for names in PRODUCTS[watched].values() for name in names]
                    factors[f"model.layers.{index}.{giver}"] = smoothing_factors(seen.largest[watched], takers)
            on_layer(index + 1, len(layers))
        if is_smoothed:
            largest = layers.norm()(states).abs().amax(dim=(0, 1))
            factors["model.norm"] = smoothing_factors(largest, [layers.head()])
    return Calibration(weights, Smoothing(factors) if is_smoothed else None)


def _rounded(
    modules: Mapping[str, torch.nn.Module], seen: LinearInputs, block_size: int
) -> Iterator[tuple[str, RoundedWeight]]:
    """The weights of a layer by the paths of their nodes; those of the same inputs together."""
    import torch

    for watched, nodes in PRODUCTS.items():
        stacks = [torch.cat([modules[name].get_parameter("weight") for name in names]) for names in nodes.values()]
        rounded = round_weights(stacks, seen.take_moments(watched), block_size)
        for path, (weight, _values) in zip(nodes, rounded, strict=True):
            yield path, weight
