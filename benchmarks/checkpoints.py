"""LLaVA checkpoints with random weights, in the Hugging Face format: for tests, the demo and benchmarks."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The chat template of the llava-hf/llava-1.5 checkpoints, in its effect.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = [
    "a",
    "the",
    "what",
    "is",
    "in",
    "of",
    "on",
    "are",
    "there",
    "picture",
    "photo",
    "image",
    "colour",
    "color",
    "shape",
    "red",
    "green",
    "blue",
    "yellow",
    "black",
    "white",
    "circle",
    "square",
    "dog",
    "cat",
    "house",
    "tree",
    "person",
    "man",
    "woman",
    "water",
    "sky",
    "road",
    "car",
    "left",
    "right",
    "above",
    "below",
    "many",
    "how",
    "and",
    "where",
    "which",
    "yes",
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "small",
    "large",
    "round",
    "USER",
    "ASSISTANT",
    ":",
    "?",
    ".",
    ",",
    "!",
    "-",
    "'",
]


@dataclass(frozen=True)
class Shape:
    """The sizes of one generated checkpoint; `vision` and `text` go to the transformers configs as they are."""

    vision: dict[str, Any]
    text: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    # Random attention is nearly flat; sharper queries and keys give scores that tell patches apart.
    attention_gain: float = 1.0


SHAPES = {
    # Small odd sizes: 8 x 8 patches, three vision heads, grouped key-value heads.
    "tiny": Shape(
        vision={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_attention_heads": 3,
            "num_hidden_layers": 6,
            "image_size": 64,
            "patch_size": 8,
        },
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 512,
            "max_position_embeddings": 512,
        },
        attention_gain=6.0,
    ),
    # The patch grid of LLaVA-1.5 (24 x 24), small everywhere else: runs in a blink.
    "demo": Shape(
        vision={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 8,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_attention_heads": 8,
            "num_hidden_layers": 4,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
        },
        attention_gain=4.0,
    ),
    # CLIP ViT-L/14 at 336 px, as in LLaVA-1.5, with a Llama of about 0.3 B parameters.
    "vit-l-0.3b": Shape(
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": 16,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        attention_gain=2.0,
    ),
    # LLaVA-OneVision-7B: SigLIP SO400M without its last layer, and Qwen2-7B.
    "onevision-7b": Shape(
        vision={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            # With the 4 px that `make_config` adds, none of which a patch sees: 384.
            "image_size": 380,
            "patch_size": 14,
        },
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_hidden_layers": 28,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
        },
    ),
    # LLaVA-1.5-7B and LLaVA-NeXT-7B (Vicuna): for benchmarks.timing.large_checkpoint, which never holds a whole model.
    "7b": Shape(
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_hidden_layers": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        attention_gain=2.0,
    ),
}


def make_tokenizer(vocab_size: int) -> Any:
    """A Llama-style tokenizer: metaspace words, byte fallback, `<s>` in front, `<image>` last in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    characters = sorted(set("".join(WORDS)) | {chr(code) for code in range(33, 127)})
    pieces = ["▁", *characters, *(f"▁{character}" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        prefix = "▁"
        for character in word:
            merges.append((prefix, character))
            prefix += character
            pieces.append(prefix)
    for piece in pieces:
        if len(vocab) < vocab_size - 1:
            vocab.setdefault(piece, len(vocab))
    # Filler, so that `<image>` takes the last row of the embedding table.
    vocab |= {f"▁w{index}": index for index in range(len(vocab), vocab_size - 1)}
    merges = [
        pair for pair in dict.fromkeys(merges) if "".join(pair) in vocab and pair[0] in vocab and pair[1] in vocab
    ]

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_checkpoint(
    folder: Path,
    shape: str = "tiny",
    *,
    family: str = "llava",
    tower: str = "clip",
    language: str = "llama",
    layout: str = "hub",
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write a checkpoint with random weights and return its folder.

    Args:
        folder: where to write; replaced if it exists.
        shape: a name in SHAPES.
        family: "llava" (LLaVA-1.5), "llava_next" or "llava_onevision".
        tower: "clip" or "siglip".
        language: "llama", "mistral" or "qwen2".
        layout: weight names as published on the hub ("hub", transformers 4) or as re-saved by
            transformers 5 ("v5").
        seed: of the weights.
        dtype: of the stored weights: float32, float16 or bfloat16.
        max_shard_size: a small value gives several shards.
        vision: overrides of the vision config.
        text: overrides of the language model's config.
        **model: overrides of the whole model's config, e.g. vision_feature_layer=-1.
    """
    import torch

    config = make_config(shape, family=family, tower=tower, language=language, vision=vision, text=text, **model)
    torch.manual_seed(seed)
    network = model_class(family)(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "vision_tower" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                # transformers makes SigLIP's larger from the start.
                weight.mul_(SHAPES[shape].attention_gain if tower == "clip" else 1.5)
            if name.endswith("bias"):
                weight.normal_(std=0.02)
    network.to(getattr(torch, dtype))
    shutil.rmtree(folder, ignore_errors=True)
    network.save_pretrained(folder, max_shard_size=max_shard_size)
    write_processor(folder, config)
    if layout == "hub":
        _rename_to_hub_layout(folder)
    return folder


def make_config(
    shape: str,
    *,
    family: str = "llava",
    tower: str = "clip",
    language: str = "llama",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **model: Any,
) -> Any:
    """The transformers config of a shape; see make_checkpoint for the arguments."""
    import transformers

    sizes = SHAPES[shape]
    text_class = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }[language]
    config_class = {
        "llava": transformers.LlavaConfig,
        "llava_next": transformers.LlavaNextConfig,
        "llava_onevision": transformers.LlavaOnevisionConfig,
    }[family]
    text_config = {"bos_token_id": 1, "eos_token_id": 2, **sizes.text, **(text or {})}
    if tower == "siglip":
        # As in the published checkpoints: the patches do not reach to the end of the image.
        side = sizes.vision["image_size"] + 4
        vision = {"image_size": side, "vision_use_head": False} | (vision or {})
        model = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} | model
    vision_class = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[tower]
    vision_config = vision_class(**{**sizes.vision, **(vision or {})})
    if family == "llava_next":
        side = vision_config.image_size
        # The five grids of llava-v1.6.
        grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
        model = {"image_grid_pinpoints": [[rows * side, cols * side] for rows, cols in grids]} | model
    if family == "llava_onevision":
        side = vision_config.image_size
        # Every grid up to 6 x 6.
        grids = [(rows, cols) for rows in range(1, 7) for cols in range(1, 7)]
        model = {
            "image_grid_pinpoints": [[rows * side, cols * side] for rows, cols in grids],
            "video_token_index": text_config["vocab_size"] - 2,
        } | model
    return config_class(
        vision_config=vision_config,
        text_config=text_class(**text_config),
        image_token_index=text_config["vocab_size"] - 1,
        **{**sizes.model, **model},
    )


def model_class(family: str) -> Any:
    """The transformers class of a family."""
    import transformers

    return {
        "llava": transformers.LlavaForConditionalGeneration,
        "llava_next": transformers.LlavaNextForConditionalGeneration,
        "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
    }[family]


def write_processor(folder: Path, config: Any, tokenizer: Any = None) -> None:
    """Write tokenizer (default: the one of `make_tokenizer`), chat template and image preprocessing for a config."""
    (tokenizer or make_tokenizer(config.text_config.vocab_size)).save_pretrained(folder)
    is_next, is_onevision = config.model_type == "llava_next", config.model_type == "llava_onevision"
    image_size = config.vision_config.image_size
    is_siglip = config.vision_config.model_type == "siglip_vision_model"
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor" if is_next else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    if is_onevision or (is_siglip and not is_next):
        image_processor = {
            "image_processor_type": "LlavaOnevisionImageProcessor" if is_onevision else "SiglipImageProcessor",
            "do_convert_rgb": True if is_onevision else None,
            "do_resize": True,
            "size": {"height": image_size, "width": image_size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    if is_onevision:
        image_processor["do_pad"] = True
    if is_next or is_onevision:
        image_processor["image_grid_pinpoints"] = config.image_grid_pinpoints
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))
    processor = {
        "processor_class": "LlavaNextProcessor" if is_next else "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 0 if is_siglip else 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_token": "<image>",
    }
    if is_onevision:
        processor = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (image_size // config.vision_config.patch_size) ** 2,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_token": "<image>",
            "video_token": "<video>",
        }
        (folder / "video_preprocessor_config.json").write_text(
            json.dumps({"video_processor_type": "LlavaOnevisionVideoProcessor", **image_processor}, indent=2)
        )
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


def _rename_to_hub_layout(folder: Path) -> None:
    """Give the vision weights the `vision_model.` that transformers 5 drops on saving."""
    from safetensors.torch import load_file, save_file

    def rename(name: str) -> str:
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)

    for shard in folder.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
        index_file.write_text(json.dumps(index))


def main() -> None:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--layout", choices=("hub", "v5"), default="hub")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_checkpoint(options.folder, options.shape, layout=options.layout, dtype=options.dtype, seed=options.seed)
    print(f"wrote a checkpoint of shape {options.shape!r} with random weights to {options.folder}")


if __name__ == "__main__":
    main()
