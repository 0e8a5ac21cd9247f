"""What a decoder of the model builder computes on a prompt, value by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.checkpoint.config import head_size
from hivtp.export.graph.rounding import ZERO_POINT
from hivtp.export.verify.operations.graph_values import GraphValues

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# The values of a layer that are compared, as the builder names them.
_PRODUCTS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
_OF_LAYER = (
    "input_layernorm/output_0",
    "input_layernorm/output_3",
    "attn/GroupQueryAttention/output_0",
    "attn/GroupQueryAttention/output_0/last",
    "post_attention_layernorm/output_0",
    "post_attention_layernorm/output_3",
    "mlp/Mul/output_0",
    *(f"{product}/{part}/output_0" for product in _PRODUCTS for part in ("MatMul", "Add")),
)


class DecoderValues:
    """The values of one run of a decoder on a whole prompt.

    Args:
        file: the decoder.
        config: of the language model.
        embeds: [length, hidden] float32, the prompt.

    Raises:
        EngineError: onnxruntime cannot run it.
    """

    def __init__(self, file: Path, config: Any, embeds: NDArray[np.float32]) -> None:
        import onnx_ir as ir

        inputs: dict[str, NDArray[Any]] = {"attention_mask": np.ones((1, len(embeds)), np.int64)}
        for value in ir.load(file).graph.inputs:
            name = str(value.name)
            if name in inputs:
                continue
            assert value.dtype is not None, "the builder names the types of its inputs"
            past = np.zeros((1, config.num_key_value_heads, 0, head_size(config)))
            inputs[name] = (embeds[None] if name == "inputs_embeds" else past).astype(value.dtype.numpy())
        self._values = GraphValues(file, inputs, _wanted(config.num_hidden_layers))
        self._num_layers = config.num_hidden_layers

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._values[name]

    def states(self, index: int) -> NDArray[Any] | None:
        """What a layer takes, [1, length, hidden]; None after the last, whose output is not in the graph."""
        name = f"/model/layers.{index}/input_layernorm/output_3" if index else "inputs_embeds"
        return self._values.get(name)

    def rotated_keys(self, index: int) -> NDArray[Any]:
        """The keys of a layer as the KV cache holds them, [1, length, heads, head size]."""
        return self._values[f"present.{index}.key"].transpose(0, 2, 1, 3)

    def last_norm(self) -> str:
        """The name of what the projection to the logits takes."""
        return f"/model/layers.{self._num_layers}/final_norm_layernorm/output_0"

    def product(self, path: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """The output of a linear layer, before and after its bias; the same where the graph adds none."""
        before = self._values[f"{path}/MatMul/output_0"]
        after = self._values.get(f"{path}/Add/output_0")
        return before, before if after is None else after

    def rounded(self, source: str) -> NDArray[np.float32] | None:
        """What w8a8 products multiply instead of a value; None in other precisions."""
        for name in (source, f"{source}/last"):
            if f"{name}/w8a8/uint8" in self._values:
                whole = self._values[f"{name}/w8a8/uint8"].astype(np.float32) - ZERO_POINT
                rounded: NDArray[np.float32] = whole * self._values[f"{name}/w8a8/scales"]
                return rounded
        return None


def _wanted(num_layers: int) -> Iterator[str]:
    values = [f"/model/layers.{num_layers}/final_norm_layernorm/output_0", "logits"]
    for index in range(num_layers):
        values += [f"present.{index}.key", *(f"/model/layers.{index}/{name}" for name in _OF_LAYER)]
    for name in values:
        yield name
        yield from (f"{name}/w8a8/{part}" for part in ("uint8", "scales"))
