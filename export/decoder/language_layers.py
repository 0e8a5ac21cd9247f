"""transformers' layers of a language model in float32, with one of them in memory at a time."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import sliding_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


class LanguageLayers:
    """The parts of a causal language model, read when they are needed.

    Args:
        config: of the language model.
        read_weight: returns a weight by its name in the causal language model.
    """

    def __init__(self, config: Any, read_weight: Callable[[str], torch.Tensor]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._config = deepcopy(config)
        self._config._attn_implementation = "sdpa"
        self._read_weight = read_weight
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(self._config).model
        # Its frequencies are not weights, so it is made anew off the meta device.
        self._rotary = type(self._skeleton.rotary_emb)(self._config)

    def __len__(self) -> int:
        return len(self._skeleton.layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A layer with its weights, which leave memory at the end."""
        layer = self._skeleton.layers[index]
        self._load(layer, f"model.layers.{index}.")
        try:
            yield layer
        finally:
            layer.to("meta")

    def norm(self) -> Any:
        """The last norm."""
        self._load(self._skeleton.norm, "model.norm.")
        return self._skeleton.norm

    def head(self) -> torch.Tensor:
        """The projection [vocab, hidden] to the logits."""
        return self._read_weight("lm_head.weight").float()

    def places(self, length: int) -> dict[str, Any]:
        """The arguments of a layer besides the hidden states [batch, length, hidden]."""
        import torch

        positions = torch.arange(length)[None]
        return {
            "attention_mask": _sees(self._config, length)[None, None],
            "position_ids": positions,
            "position_embeddings": self._rotary(torch.empty(0), positions),
        }

    def _load(self, module: torch.nn.Module, prefix: str) -> None:
        weights = {name: self._read_weight(prefix + name).float() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        module.eval()


def _sees(config: Any, length: int) -> torch.Tensor:
    """Which positions [length, length] attend to which: those before them, in a sliding window if there is one."""
    import torch

    sees = torch.ones(length, length, dtype=torch.bool).tril()
    window = sliding_window(config)
    return sees if window is None else sees.triu(1 - window)
