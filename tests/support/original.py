"""Checkpoints in the layout of the original LLaVA code, scaled down, and their conversion to that of transformers."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import WORDS, make_checkpoint, model_class

if TYPE_CHECKING:
    from pathlib import Path

NUM_PIECES = 400
# As convert_llava_weights_to_hf.py and convert_llava_next_weights_to_hf.py of transformers map the names.
TO_TRANSFORMERS = {
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}


def vocabulary() -> bytes:
    """A tokenizer.model of NUM_PIECES pieces, of the kind of Llama 2."""
    import sentencepiece

    written = io.BytesIO()
    words = [word for word in WORDS if word.isalnum()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[first:] + words[:first]) for first in range(len(words))]),
        model_writer=written,
        vocab_size=NUM_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()


def make_original(folder: Path, tower: Path, *, family: str, language: str, holds_tower: bool, **config: Any) -> Path:
    """Write a checkpoint as the original code saves it.

    Args:
        folder: where to write.
        tower: where to write the CLIP model that it was made from.
        family: "llava" is of the kind of v1.5, "llava_next" of v1.6.
        language: "llama" or "mistral".
        holds_tower: whether the weights of the tower are among its own.
        **config: further keys of its config.
    """
    text = {"vocab_size": NUM_PIECES, "initializer_range": 0.2, "max_position_embeddings": 2048}
    text |= {"sliding_window": None} if language == "mistral" else {}
    make_checkpoint(folder, family=family, language=language, text=text, dtype="float16")
    settings = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        file.unlink()
    own: dict[str, Any] = {}
    of_tower: dict[str, Any] = {}
    for name, weight in weights.items():
        kept = name.removeprefix("model.")
        if kept.startswith("vision_tower."):
            of_tower[kept.removeprefix("vision_tower.")] = weight
            kept = f"model.vision_tower.{kept}"
        elif kept.startswith("multi_modal_projector."):
            kept = kept.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
            kept = kept.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        elif kept == "image_newline":
            kept = "model.image_newline"
        else:
            kept = "lm_head.weight" if "lm_head" in kept else f"model.{kept.removeprefix('language_model.')}"
            kept = kept.replace("model.model.", "model.")
        if holds_tower or not kept.startswith("model.vision_tower."):
            own[kept] = weight
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    names = {"llama": "Llama", "mistral": "Mistral"}
    dropped = ("architectures", "model_type", "dtype")
    original = {name: value for name, value in settings["text_config"].items() if name not in dropped} | {
        "architectures": [f"Llava{names[language]}ForCausalLM"],
        "model_type": f"llava_{language}",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "anyres" if family == "llava_next" else "pad",
        "image_grid_pinpoints": settings.get("image_grid_pinpoints"),
        "mm_hidden_size": settings["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    if family == "llava_next":
        original |= {"mm_patch_merge_type": "spatial_unpad", "image_crop_resolution": 224}
    (folder / "config.json").write_text(json.dumps(original | config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer.model").write_bytes(vocabulary())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    tower.mkdir()
    vision = settings["vision_config"] | {"model_type": "clip_vision_model"}
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    save_file(of_tower, tower / "model.safetensors", {"format": "pt"})
    return folder


def convert(folder: Path, tower: Path, target: Path, template: str) -> Path:
    """Convert a checkpoint as the scripts of transformers do; added rows are the mean, from which those draw them."""
    import torch
    import transformers
    from tokenizers import AddedToken

    raw = json.loads((folder / "config.json").read_text())
    language = raw["model_type"].removeprefix("llava_")
    is_next = raw["image_aspect_ratio"] == "anyres"
    text_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[language]
    vision = json.loads((tower / "config.json").read_text())["vision_config"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    config_class = transformers.LlavaNextConfig if is_next else transformers.LlavaConfig
    settings = {"image_grid_pinpoints": raw["image_grid_pinpoints"]} if is_next else {}
    config = config_class(
        vision_config=vision,
        text_config=text_class(**{key: value for key, value in raw.items() if key in text_class().to_dict()}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=raw["mm_vision_select_layer"],
        **settings,
    )
    config.text_config.model_type = language
    with torch.device("meta"):
        model = model_class("llava_next" if is_next else "llava")(config)
    model.to_empty(device="cpu")
    state = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        prefix = next(prefix for prefix in TO_TRANSFORMERS if name.startswith(prefix))
        state[TO_TRANSFORMERS[prefix] + name.removeprefix(prefix)] = weight.float()
    for name, weight in load_file(tower / "model.safetensors").items():
        state.setdefault(f"vision_tower.{name}", weight.float())
    file = target.with_name(f"{target.name}-before")
    file.mkdir()
    save_file(state, file / "model.safetensors", {"format": "pt"})
    config.save_pretrained(file)
    model = type(model).from_pretrained(file, dtype=torch.float32)
    num_stored = config.text_config.vocab_size
    embeddings = model.get_input_embeddings().weight.data
    mean = embeddings.half().float().mean(dim=0).half().float()
    model.resize_token_embeddings(num_stored + 2, 64)
    model.get_input_embeddings().weight.data[num_stored:] = mean
    model.get_output_embeddings().weight.data[num_stored:] = mean
    model.save_pretrained(target)
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if is_next:
        image = transformers.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
    elif raw["image_aspect_ratio"] == "pad":
        image = transformers.LlavaImageProcessorPil(**sizes, do_pad=True)
    else:
        image = transformers.CLIPImageProcessorPil(**sizes)
    kind = transformers.LlavaNextProcessor if is_next else transformers.LlavaProcessor
    kind(
        image,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(target)
    return target
