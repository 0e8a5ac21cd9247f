"""Published checkpoints, scaled down: their config keys, weight names, tokenizers, templates and other files.

Weights are random, and of the vocabulary only the special tokens are the original's. All else is as on the hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import WORDS, make_checkpoint, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

IMAGES_FIRST = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
)
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + IMAGES_FIRST + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    + IMAGES_FIRST
    + "{{ content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{{'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'}}"
    + IMAGES_FIRST
    + "{{ content['text'] }}{% endfor %}{{'<|eot_id|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Of the language models alone: content is text.
LLAMA3_TEXT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
PHI3_TEXT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\\n' + "
    "message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Published:
    """What is particular to one published checkpoint.

    Attributes:
        family: "llava" or "llava_next".
        language: "llama" or "mistral".
        text: its text_config beside the scaled sizes.
        text_sizes: overrides of the scaled sizes.
        tokenizer: "sentencepiece" for the kind of Llama 2, "byte-level" for that of Llama 3.
        special_tokens: that follow the vocabulary, before <image>.
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
    named_tokens: dict[str, str] = field(
        default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    )
    adds_bos: bool = True
    template_file: str = "chat_template.json"
    generation: dict[str, Any] = field(default_factory=lambda: {"bos_token_id": "<s>", "eos_token_id": "</s>"})
    has_processor_config: bool = True
    tokenizer_class: str = "LlamaTokenizer"


_LLAMA3 = {
    "tokenizer": "byte-level",
    "special_tokens": LLAMA3_TOKENS,
    "text": {"rope_theta": 500000.0, "max_position_embeddings": 8192},
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
}


def make_published(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write one of PUBLISHED with random weights, in float16 as most are, and return its folder.

    Args:
        folder: where to write; replaced if it exists.
        name: its id on the hub.
        seed: of the weights.
    """
    published = PUBLISHED[name]
    text = {"initializer_range": 0.2, "vocab_size": 448, **published.text_sizes}
    scaled = {key: value for key, value in published.text.items() if key not in ("_name_or_path", "use_cache")}
    make_checkpoint(
        folder,
        family=published.family,
        language=published.language,
        text=text | scaled,
        seed=seed,
        dtype="float16",
        max_shard_size="300KB",
    )
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    ids = _write_tokenizer(folder, published)
    _write_configs(folder, published, ids)
    if not published.has_processor_config:
        (folder / "processor_config.json").unlink()
    return folder


def _write_tokenizer(folder: Path, published: Published) -> dict[str, int]:
    """Write the tokenizer's files; the ids of all special tokens by their text."""
    base = 400
    tokenizer = make_tokenizer(base) if published.tokenizer == "sentencepiece" else _byte_level_tokenizer(base)
    backend = tokenizer.backend_tokenizer if published.tokenizer == "sentencepiece" else tokenizer
    from tokenizers import AddedToken, Tokenizer, processors

    spec = json.loads(backend.to_str())
    # The maker of the others puts <image> into the vocabulary; here it follows, as on the hub.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<image>"]
    spec["model"]["vocab"] = {token: index for token, index in spec["model"]["vocab"].items() if index < base - 1}
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*published.special_tokens, "<image>", "<pad>")]
    )
    bos = published.named_tokens["bos_token"]
    if published.adds_bos:
        processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    else:
        processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    backend.post_processor = processor
    backend.save(str(folder / "tokenizer.json"))
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token_id, token in backend.get_added_tokens_decoder().items()
    }
    config = {
        "added_tokens_decoder": added,
        **published.named_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left",
        "processor_class": "LlavaNextProcessor" if published.family == "llava_next" else "LlavaProcessor",
        "tokenizer_class": published.tokenizer_class,
    }
    if published.tokenizer == "sentencepiece":
        config |= {
            "add_bos_token": published.adds_bos,
            "add_eos_token": False,
            "legacy": False,
            "sp_model_kwargs": {},
            "use_default_system_prompt": False,
        }
    if published.template_file == "tokenizer_config.json":
        config["chat_template"] = published.template
    elif published.template_file == "chat_template.json":
        _write(folder / published.template_file, {"chat_template": published.template})
    else:
        (folder / published.template_file).write_text(published.template)
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", published.named_tokens)
    _write(folder / "added_tokens.json", {token: backend.token_to_id(token) for token in ("<image>", "<pad>")})
    return {token["content"]: int(token_id) for token_id, token in added.items()}


def _write_configs(folder: Path, published: Published, ids: dict[str, int]) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    scaled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    text = {name: sizes["text_config"][name] for name in (*scaled, "vocab_size")}
    text |= {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[published.language]],
        "max_position_embeddings": 4096,
        "model_type": published.language,
        "torch_dtype": "float16",
    }
    text |= published.text
    vision = {
        name: sizes["vision_config"][name] for name in (*scaled[:3], "num_hidden_layers", "image_size", "patch_size")
    }
    vision |= {"model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000}
    is_next = published.family == "llava_next"
    config = {
        "architectures": ["LlavaNextForConditionalGeneration" if is_next else "LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": ids["<image>"],
        "model_type": published.family,
        "pad_token_id": ids["<pad>"],
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0" if is_next else "4.36.0.dev0",
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if is_next:
        config |= {"image_grid_pinpoints": sizes["image_grid_pinpoints"], "use_image_newline_parameter": True}
    _write(folder / "config.json", config)
    generation: dict[str, Any] = {
        "_from_model_config": True,
        "pad_token_id": ids["<pad>"],
        "transformers_version": "4.36.0",
    }
    for name, value in published.generation.items():
        tokens = value if isinstance(value, list) else [value]
        found = [ids[token] if isinstance(token, str) else token for token in tokens]
        generation[name] = found if isinstance(value, list) else found[0]
    _write(folder / "generation_config.json", generation)


def _byte_level_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of the kind of Llama 3: bytes, merged by rank, split by its pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return tokenizer


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2))
