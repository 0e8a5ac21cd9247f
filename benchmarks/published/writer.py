"""Writes published checkpoints scaled down.

Weights are random, and of the vocabulary only the special tokens are the original's. All else is as on the hub.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import WORDS, make_checkpoint, make_tokenizer
from benchmarks.published.checkpoints import PUBLISHED, Published

if TYPE_CHECKING:
    from pathlib import Path


PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
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
        tower=published.tower,
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
    last = (*published.special_tokens, *published.last_tokens)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in last])
    if published.adds_bos:
        bos = published.named_tokens["bos_token"]
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
        "processor_class": PROCESSORS[published.family],
        "tokenizer_class": published.tokenizer_class,
    }
    if published.tokenizer_class == "Qwen2Tokenizer":
        config |= {"add_prefix_space": False, "bos_token": None, "errors": "replace", "unk_token": None}
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
    _write(folder / "added_tokens.json", {token: backend.token_to_id(token) for token in published.last_tokens})
    return {token["content"]: int(token_id) for token_id, token in added.items()}


def _write_configs(folder: Path, published: Published, ids: dict[str, int]) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    scaled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    text = {name: sizes["text_config"][name] for name in (*scaled, "vocab_size")}
    architectures = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    text |= {
        "architectures": [architectures[published.language]],
        "max_position_embeddings": 4096,
        "model_type": published.language,
        "torch_dtype": "float16",
    }
    text |= published.text
    vision = {
        name: sizes["vision_config"][name] for name in (*scaled[:3], "num_hidden_layers", "image_size", "patch_size")
    }
    if published.tower == "siglip":
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    else:
        vision |= {"model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000}
    is_next = published.family == "llava_next"
    config = {
        "architectures": [PROCESSORS[published.family].replace("Processor", "ForConditionalGeneration")],
        "ignore_index": -100,
        "image_token_index": ids["<image>"],
        "model_type": published.family,
        "pad_token_id": ids[published.named_tokens["pad_token"]],
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": bool(published.text.get("tie_word_embeddings")),
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0" if is_next else "4.36.0.dev0",
        "vision_config": vision,
        "vision_feature_layer": sizes["vision_feature_layer"],
        "vision_feature_select_strategy": sizes["vision_feature_select_strategy"],
    }
    if published.family == "llava_onevision":
        config |= {
            "image_grid_pinpoints": sizes["image_grid_pinpoints"],
            "use_image_newline_parameter": True,
            "video_token_index": ids["<video>"],
            "vision_aspect_ratio": "anyres_max_9",
        }
        del config["pad_token_id"]
    if is_next:
        config |= {"image_grid_pinpoints": sizes["image_grid_pinpoints"], "use_image_newline_parameter": True}
    _write(folder / "config.json", config)
    generation: dict[str, Any] = {
        "_from_model_config": True,
        "pad_token_id": ids[published.named_tokens["pad_token"]],
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
