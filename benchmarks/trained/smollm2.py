"""A trained SmolLM2-135M-Instruct as the language model of a LLaVA checkpoint, with its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.checkpoints import CHAT_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

IMAGE_TOKEN = "<image>"
CONTROL_TOKEN = 3
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `transformers.LlamaConfig`, with one token more for images."""
    return {
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]) + 1,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": False,
    }


def llama_weights(metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, torch.Tensor]:
    """The weights of a `LlamaForCausalLM`, by their names in it; the image token's embedding is the mean of all."""
    import torch

    table = tensors["token_embd.weight"]
    table = np.concatenate([table, table.mean(axis=0, keepdims=True)])
    found = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": table.copy(),
    }
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    for index in range(metadata["llama.block_count"]):
        for theirs, ours in NAMES.items():
            weight = tensors[f"blk.{index}.{theirs}.weight"]
            if theirs in heads:
                weight = rotated_in_halves(weight, heads[theirs])
            found[f"model.layers.{index}.{ours}.weight"] = weight
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def rotated_in_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Queries or keys [heads * size, hidden] whose neighbours rotate together, as rows whose halves do."""
    pairs = weight.reshape(num_heads, len(weight) // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of(metadata: Mapping[str, Any]) -> Any:
    """Its tokenizer for transformers, with the chat template of LLaVA-1.5."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, IMAGE_TOKEN]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
