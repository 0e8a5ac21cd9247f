"""The layers of a decoder: each operation against transformers, on the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.checkpoint.config import head_size
from hivtp.export.verify.operations.decoder_values import DecoderValues
from hivtp.export.verify.operations.steering import Comparison, Steering, take_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from hivtp.export.decoder.rounding.smoothing import Smoothing
    from hivtp.export.verify.operations.decoder_weights import DecoderWeights

# The last layer computes the last position only, after its attention.
_LAST = (-1,)


class DecoderLayers:
    """Compares a decoder with transformers' layers, as `language_reference` comes to them.

    The decoder runs once, on a whole prompt. Each layer of transformers then takes what the decoder's has taken, with
    the weights that the decoder holds, and what it computes is compared operation by operation.

    Args:
        file: the decoder.
        config: of the language model.
        embeds: [length, hidden] float32, the prompt.
        weights: those that the decoder holds; None where they are the checkpoint's.
        smoothing: of the decoder, which is compared too: it must change nothing but what passes between operations.

    Attributes:
        found: the comparisons.
        logits: [length, vocab] float32, of transformers with the decoder's weights on the prompt, once `head` was
            called.
    """

    def __init__(
        self,
        file: Path,
        config: Any,
        embeds: NDArray[np.float32],
        weights: DecoderWeights | None,
        smoothing: Smoothing | None = None,
    ) -> None:
        import torch

        self.found: list[Comparison] = []
        self.logits = np.empty((0, 0), np.float32)
        self._config = config
        self._weights = weights
        self._smoothing = smoothing
        self._values = DecoderValues(file, config, embeds)
        self._states = torch.from_numpy(embeds)[None]
        self._output = self._states

    def layer(self, index: int, layer: torch.nn.Module, places: Mapping[str, Any]) -> None:
        """Compare one layer.

        Args:
            index: which.
            layer: of transformers, with the checkpoint's weights; afterwards it has the decoder's.
            places: its other arguments, for the whole prompt.
        """
        import torch
        from transformers import DynamicCache

        place, values = f"layer {index}", self._values
        if self._smoothing is not None:
            expected = layer(self._states, **places)
            _smooth(layer, f"model.layers.{index}.", self._smoothing)
            self._compare_smoothed(place, layer(self._states, **places), expected)
        if self._weights is not None:
            take_weights(layer, f"model.layers.{index}.", self._weights.rounded, place, self.found)
        self._states = layer(self._states, **places)
        taken, cache = values.states(index), DynamicCache()
        assert taken is not None, "every layer takes what the one before it gives"
        with Steering(place, self.found, _LAST) as steering:
            self._steer(steering, layer, f"/model/layers.{index}")
            hidden = torch.from_numpy(np.asarray(taken, np.float32))
            self._output = layer(hidden, past_key_values=cache, use_cache=True, **places)
            keys = cache.layers[index].keys.transpose(1, 2)
            steering.compare("operation", "rotated keys", keys, values.rotated_keys(index))
            given = values.states(index + 1)
            if given is not None:
                steering.compare("operation", "output", self._output, given)

    def head(self, norm: torch.nn.Module, head: torch.Tensor) -> None:
        """Compare the last norm and the projection [vocab, hidden] to the logits."""
        import torch

        place, values = "head", self._values
        vocab_size, hidden_size = head.shape
        linear = torch.nn.Linear(hidden_size, vocab_size, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(head, requires_grad=False)
        if self._smoothing is not None:
            expected = linear(norm(self._states))
            _smooth(norm, "model.norm.", self._smoothing)
            _smooth(linear, "lm_head.", self._smoothing)
            self._compare_smoothed(place, linear(norm(self._states)), expected)
        if self._weights is not None:
            take_weights(linear, "lm_head.", self._weights.rounded, place, self.found)
        self.logits = linear(norm(self._states))[0].numpy()
        with Steering(place, self.found, _LAST) as steering:
            source = values.last_norm()
            steering.gives("operation", "norm", norm, values[source])
            steering.product("lm_head", linear, values.rounded(source), values["logits"])
            linear(norm(self._output[:, -1:]))

    def _compare_smoothed(self, place: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        with Steering(place, self.found, _LAST) as steering:
            steering.compare("operation", "smoothed output", expected, found.numpy())

    def _steer(self, steering: Steering, layer: Any, at: str) -> None:
        attention, mlp, values, config = layer.self_attn, layer.mlp, self._values, self._config
        normed = f"{at}/input_layernorm/output_0"
        steering.gives("operation", "first norm", layer.input_layernorm, values[normed])
        # The builder stacks the three.
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
        start, stacked = 0, values.product(f"{at}/attn/qkv_proj")
        for kind, num_heads in heads.items():
            stop = start + num_heads * head_size(config)
            part = (stacked[0][..., start:stop], stacked[1][..., start:stop])
            self._product(steering, f"{kind}_proj", attention, normed, part)
            start = stop
        mixed = f"{at}/attn/GroupQueryAttention/output_0"
        steering.takes("operation", "attention", attention.o_proj, values[mixed])
        self._product(steering, "o_proj", attention, mixed, values.product(f"{at}/attn/o_proj"))
        # The builder adds and normalises in one operation.
        norm, normed = layer.post_attention_layernorm, f"{at}/post_attention_layernorm/output_0"
        steering.takes("operation", "sum", norm, values[f"{at}/post_attention_layernorm/output_3"])
        steering.gives("operation", "second norm", norm, values[normed])
        for name in ("gate_proj", "up_proj"):
            self._product(steering, name, mlp, normed, values.product(f"{at}/mlp/{name}"))
        gated = f"{at}/mlp/Mul/output_0"
        steering.takes("operation", "activation", mlp.down_proj, values[gated])
        self._product(steering, "down_proj", mlp, gated, values.product(f"{at}/mlp/down_proj"))

    def _product(
        self, steering: Steering, name: str, parent: Any, source: str, results: tuple[NDArray[Any], NDArray[Any]]
    ) -> None:
        import torch

        module, (before, after) = getattr(parent, name), results
        if module.bias is not None:
            # Apart from the product, whose rounding would hide it.
            biased = torch.from_numpy(before.astype(np.float32)) + module.bias
            steering.compare("operation", f"bias of {name}", biased, after)
        steering.product(name, module, self._values.rounded(source), after)


def _smooth(module: torch.nn.Module, prefix: str, smoothing: Smoothing) -> None:
    """Give a module the weights of the smoothed model; its own may be mapped from the checkpoint, and stay."""
    state = {name: smoothing.smoothed(prefix + name, weight) for name, weight in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
