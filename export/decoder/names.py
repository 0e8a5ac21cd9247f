"""How the model builder names the linear maps of a decoder, and which weights of the checkpoint each of them is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import head_size

if TYPE_CHECKING:
    from collections.abc import Mapping

# "qkv" is three of them stacked.
_NODE_NAME = re.compile(r"^/model/layers\.(?P<layer>\d+)/(?P<block>attn|mlp)/(?P<kind>\w+)_proj/")
_BLOCKS = {"attn": "self_attn", "mlp": "mlp"}
HEAD = "lm_head.weight"


def product_name(index: int, path: str) -> str:
    """The node of a layer's linear map: "attn/qkv_proj", "attn/o_proj", "mlp/gate_proj" and so on."""
    return f"/model/layers.{index}/{path}/MatMul"


def weights_of(node_name: str, config: Any) -> Mapping[str, slice]:
    """The weights that a node multiplies by, by their names in the causal language model, each with its outputs."""
    match = _NODE_NAME.match(node_name)
    if match is None:
        return {HEAD: slice(None)}
    prefix = f"model.layers.{match['layer']}.{_BLOCKS[match['block']]}"
    if match["kind"] != "qkv":
        return {f"{prefix}.{match['kind']}_proj.weight": slice(None)}
    found, start = {}, 0
    for kind, num_heads in zip("qkv", (config.num_attention_heads, *[config.num_key_value_heads] * 2), strict=True):
        stop = start + num_heads * head_size(config)
        found[f"{prefix}.{kind}_proj.weight"] = slice(start, stop)
        start = stop
    return found


def vectors_of(num_layers: int) -> Mapping[str, str]:
    """The gains of norms, and the biases of `up_proj`, by their names in the graph: those in the language model."""
    found = {f"model.layers.{num_layers}.final_norm_layernorm.weight": "model.norm.weight"}
    for index in range(num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{index}.{norm}.weight"] = f"model.layers.{index}.{norm}.weight"
        found[f"model.layers.{index}.mlp.up_proj.Add.bias"] = f"model.layers.{index}.mlp.up_proj.bias"
    return found
