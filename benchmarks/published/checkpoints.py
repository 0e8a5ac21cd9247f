"""What is particular to each published checkpoint: config keys, special tokens, templates and other files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.published.templates import (
    CHATML_TEMPLATE,
    LLAMA3_TEMPLATE,
    LLAMA3_TEXT_TEMPLATE,
    MISTRAL_TEMPLATE,
    ONEVISION_TEMPLATE,
    PHI3_TEXT_TEMPLATE,
    VICUNA_TEMPLATE,
)

LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Published:
    """What is particular to one published checkpoint.

    Attributes:
        family: "llava", "llava_next" or "llava_onevision".
        tower: "clip" or "siglip".
        language: "llama", "mistral" or "qwen2".
        text: its text_config beside the scaled sizes.
        text_sizes: overrides of the scaled sizes.
        tokenizer: "sentencepiece" for the kind of Llama 2, "byte-level" for that of Llama 3.
        special_tokens: that follow the vocabulary, before <image>.
        last_tokens: <image>, and what follows it.
        named_tokens: bos_token and the like.
        adds_bos: whether the tokenizer puts bos in front of a text.
        template: its chat template.
        template_file: where the template stands: chat_template.json, chat_template.jinja or tokenizer_config.json.
        generation: its generation_config.json; token ids by their tokens.
        has_processor_config: whether it has processor_config.json.
        tokenizer_class: as its tokenizer_config.json says.
    """

    family: str
    language: str
    template: str
    text: dict[str, Any] = field(default_factory=dict)
    text_sizes: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "sentencepiece"
    special_tokens: tuple[str, ...] = ()
    last_tokens: tuple[str, ...] = ("<image>", "<pad>")
    named_tokens: dict[str, str] = field(
        default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    )
    adds_bos: bool = True
    template_file: str = "chat_template.json"
    generation: dict[str, Any] = field(default_factory=lambda: {"bos_token_id": "<s>", "eos_token_id": "</s>"})
    has_processor_config: bool = True
    tokenizer_class: str = "LlamaTokenizer"
    tower: str = "clip"


_LLAMA3 = {
    "tokenizer": "byte-level",
    "special_tokens": LLAMA3_TOKENS,
    "text": {"rope_theta": 500000.0, "max_position_embeddings": 8192},
}
_QWEN2: dict[str, Any] = {
    "tokenizer": "byte-level",
    "special_tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "last_tokens": ("<image>",),
    "named_tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "adds_bos": False,
    "generation": {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"},
    "tokenizer_class": "Qwen2Tokenizer",
}
_QWEN2_TEXT: dict[str, Any] = {
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": Published(
        "llava", "llama", VICUNA_TEMPLATE, {"_name_or_path": "lmsys/vicuna-7b-v1.5", "rms_norm_eps": 1e-5}
    ),
    # 40 heads, and as many for keys and values.
    "llava-hf/llava-1.5-13b-hf": Published(
        "llava",
        "llama",
        VICUNA_TEMPLATE,
        {"_name_or_path": "lmsys/vicuna-13b-v1.5", "rms_norm_eps": 1e-5},
        {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5},
    ),
    "llava-hf/bakLlava-v1-hf": Published(
        "llava",
        "mistral",
        VICUNA_TEMPLATE,
        {"_name_or_path": "mistralai/Mistral-7B-v0.1", "rms_norm_eps": 1e-5, "sliding_window": 40},
    ),
    "xtuner/llava-llama-3-8b-v1_1-transformers": Published(
        "llava",
        "llama",
        LLAMA3_TEXT_TEMPLATE,
        named_tokens={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
        template_file="tokenizer_config.json",
        generation={"bos_token_id": "<|begin_of_text|>", "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
        has_processor_config=False,
        tokenizer_class="LlamaTokenizer",
        **_LLAMA3,
    ),
    # Phi-3 made a Llama by splitting its weights; keys of Phi-3 stay in its config. Heads of size 96.
    "xtuner/llava-phi-3-mini-hf": Published(
        "llava",
        "llama",
        PHI3_TEXT_TEMPLATE,
        {
            "_name_or_path": "microsoft/Phi-3-mini-4k-instruct",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
        },
        {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2},
        special_tokens=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        named_tokens={
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        template_file="tokenizer_config.json",
        generation={"bos_token_id": "<s>", "eos_token_id": ["<|endoftext|>", "<|end|>"]},
        has_processor_config=False,
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Published(
        "llava_next", "llama", VICUNA_TEMPLATE, {"_name_or_path": "lmsys/vicuna-7b-v1.5", "rms_norm_eps": 1e-5}
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": Published(
        "llava_next",
        "mistral",
        MISTRAL_TEMPLATE,
        {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 32768},
        template_file="chat_template.jinja",
    ),
    # Yi: no bos in front, ChatML.
    "llava-hf/llava-v1.6-34b-hf": Published(
        "llava_next",
        "llama",
        CHATML_TEMPLATE,
        {"rope_theta": 5000000.0, "rms_norm_eps": 1e-5, "use_cache": False},
        {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
        special_tokens=("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        named_tokens={
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        adds_bos=False,
        generation={"bos_token_id": "<|startoftext|>", "eos_token_id": "<|im_end|>"},
    ),
    "llava-hf/llama3-llava-next-8b-hf": Published(
        "llava_next",
        "llama",
        LLAMA3_TEMPLATE,
        named_tokens={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"},
        generation={
            "bos_token_id": "<|begin_of_text|>",
            "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        tokenizer_class="PreTrainedTokenizerFast",
        **_LLAMA3,
    ),
    # Of the smaller one the head is the embedding table.
    "llava-hf/llava-interleave-qwen-0.5b-hf": Published(
        "llava",
        "qwen2",
        CHATML_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat", "tie_word_embeddings": True},
        tower="siglip",
        **_QWEN2,
    ),
    "llava-hf/llava-interleave-qwen-7b-hf": Published(
        "llava",
        "qwen2",
        CHATML_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen1.5-7B-Chat", "tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        tower="siglip",
        **_QWEN2,
    ),
    "llava-hf/llava-next-72b-hf": Published(
        "llava_next",
        "qwen2",
        CHATML_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen1.5-72B-Chat", "tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        **_QWEN2,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Published(
        "llava_onevision",
        "qwen2",
        ONEVISION_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "tie_word_embeddings": True},
        tower="siglip",
        **{**_QWEN2, "last_tokens": ("<image>", "<video>")},
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Published(
        "llava_onevision",
        "qwen2",
        ONEVISION_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen2-7B-Instruct", "tie_word_embeddings": False},
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
        tower="siglip",
        **{**_QWEN2, "last_tokens": ("<image>", "<video>")},
    ),
    # Heads in groups.
    "llava-hf/llava-next-110b-hf": Published(
        "llava_next",
        "qwen2",
        CHATML_TEMPLATE,
        {**_QWEN2_TEXT, "_name_or_path": "Qwen/Qwen1.5-110B-Chat", "tie_word_embeddings": False},
        {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 1},
        **_QWEN2,
    ),
}
