"""Checkpoints in layouts that are not read, each refused by its name with the way to one that is."""

from __future__ import annotations

import contextlib
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from hivtp.runtime.checkpoint.weight_files import entry_file
from hivtp.runtime.checkpoint.weight_names import canonical_name
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from hivtp.runtime.checkpoint.weight_files import Location

MAX_NAMES = 100_000
SAVE_AGAIN = "open it with transformers and write it with save_pretrained, which writes safetensors"
TO_FLOAT = (
    "export the original checkpoint in float16, bfloat16 or float32, and choose precisions with --vision-precision and "
    "--language-precision"
)
PICKLED = "only pickled weights, which can carry code"
REWRITE = (
    "if you trust it, read its files with torch.load(file, weights_only=True), and write all their tensors with "
    "safetensors.torch.save_file to one model.safetensors beside them"
)
# By the form of a file's name: what a folder without safetensors of transformers is, and the way out.
_FILES = (
    (r"\.distcp$|^__\d+_\d+|_fsdp(_\d+)?(\.bin|/)", "shards of FSDP", "merge them with accelerate merge-weights"),
    (
        r"^zero_to_fp32\.py$|zero_pp_rank_.*_optim_states\.pt$",
        "shards of DeepSpeed",
        "merge them with its script zero_to_fp32.py --safe_serialization, beside a config.json",
    ),
    (r"\.gguf$", "GGUF weights, a format of llama.cpp", f"{TO_FLOAT}; it is the one that the GGUF was made from"),
    (r"^consolidated.*\.(safetensors|pth)$", "weights in the layout of Mistral's or Meta's own code", SAVE_AGAIN),
    (r"^weights(\.\d+)?\.(npz|safetensors)$", "weights of MLX", TO_FLOAT),
    (r"^(tf_model.*\.h5|flax_model.*\.msgpack)$", "weights of TensorFlow or Flax", SAVE_AGAIN),
    (
        r"^(?!training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pth|pt|ckpt)$",
        PICKLED,
        f"if you trust it, {SAVE_AGAIN}",
    ),
)
# Keys of a config, or of one of its parts, that say how weights are rounded; and files that say the same.
_QUANTISATION_KEYS = ("quantization_config", "quantization", "quant_config", "compression_config")
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_ORIGINAL = (
    "holds weights in the layout of the original LLaVA code under a config of transformers; take the config.json that "
    "belongs to the weights, or the conversion from https://huggingface.co/llava-hf"
)
_MERGE = (
    "merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and "
    "export that folder with the processor of the base model beside it"
)
_UNMERGED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
_ROUNDED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale\w*|weight_packed|weight_zero_point|SCB|quant_state\w*|absmax|quant_map)\b"
)
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def file_names(folder: Path) -> list[str]:
    """Names in a folder and in the folders right in it, as far as they can be read.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    names: list[str] = []
    try:
        for item in islice(folder.iterdir(), MAX_NAMES):
            names.append(item.name)
            # A folder that may not be read, as lost+found, is of no matter.
            with contextlib.suppress(PermissionError):
                if item.is_dir():
                    names.extend(f"{item.name}/{inner.name}" for inner in islice(item.iterdir(), MAX_NAMES))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return names


def refuse_kind(place: object, names: Collection[str]) -> None:
    """Refuse what the names of its files show to be something else than a whole checkpoint in floating point.

    Args:
        place: the folder or repository, for messages.
        names: of its files.

    Raises:
        CheckpointError: what it is, and the way out.
    """
    if "manifest.json" in names and "config.json" not in names:
        raise CheckpointError(f"{place} is not a checkpoint; it looks like a bundle, which hivtp run takes as it is")
    if "adapter_config.json" in names:
        raise CheckpointError(f"{place} holds an adapter (LoRA or another of PEFT), not a whole model; {_MERGE}")
    for name in _QUANTISATION_FILES:
        if name in names:
            raise CheckpointError(f"{place} is quantised, as its {name} says; {TO_FLOAT}")


def refuse_formats(place: object, names: Collection[str], *, is_original: bool = False) -> None:
    """Refuse weights in other formats than safetensors, where there are no others.

    Args:
        place: the folder or repository, for messages.
        names: of its files.
        is_original: whether the config is one of the original LLaVA code, whose weights transformers cannot open.

    Raises:
        CheckpointError: which format, and the way out; or that there are no weights.
    """
    try:
        if entry_file(names) is not None:
            return
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    for form, what, advice in _FILES:
        found = next((name for name in sorted(names) if re.search(form, name)), None)
        if found is not None:
            advice = REWRITE if is_original and what == PICKLED else advice
            raise CheckpointError(f"{place} holds {what} ({found}) and no model.safetensors; {advice}")
    raise CheckpointError(
        f"{place} holds no weights: it has neither model.safetensors nor model.safetensors.index.json; download it "
        "again, or give the folder that has them"
    )


def refuse_config(place: object, raw: Mapping[str, Any]) -> None:
    """Refuse a config of rounded weights, or one whose weights are elsewhere.

    Raises:
        CheckpointError: what it is, and the way out.
    """
    for part in ("", "text_config", "vision_config"):
        config = raw.get(part) if part else raw
        if not isinstance(config, dict):
            continue
        for key in _QUANTISATION_KEYS:
            if config.get(key):
                raise CheckpointError(f"{place} is quantised ({_method(config[key])}, {key} in its config); {TO_FLOAT}")
    if raw.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{place} names its weights in config.json (transformers_weights), which is not read; rename them to "
            "model.safetensors and take the key out"
        )


def refuse_weights(place: object, weights: Iterable[Location], *, is_original: bool = False) -> None:
    """Refuse weights of other layouts, and rounded ones.

    Args:
        place: the folder, for messages.
        weights: as they are stored.
        is_original: whether the config is one of the original LLaVA code.

    Raises:
        CheckpointError: what they are, and the way out.
    """
    for weight in weights:
        name, shown = f".{weight.name}.", f"{weight.name!r}"
        if _UNMERGED.search(name):
            raise CheckpointError(f"{place} holds an adapter that is not merged ({shown}); {_MERGE}")
        if _ROUNDED_NAMES.search(name):
            raise CheckpointError(f"{place} is quantised, as its weight {shown} shows; {TO_FLOAT}")
        if "_flat_param" in name:
            raise CheckpointError(
                f"{place} holds flattened weights of FSDP ({shown}); save the full state dict "
                "(FullStateDictConfig, or accelerate's fsdp_state_dict_type FULL_STATE_DICT), and export that"
            )
        if ".mm_projector." in name and not is_original:
            raise CheckpointError(f"{place} {_ORIGINAL}")
        if weight.dtype not in _FLOAT_DTYPES and canonical_name(weight.name) is not None:
            raise CheckpointError(f"{place} is quantised: its weight {shown} is {weight.dtype}; {TO_FLOAT}")


def _method(config: object) -> str:
    if isinstance(config, dict):
        method = config.get("quant_method") or config.get("quant_algo") or config.get("mode")
        if isinstance(method, str):
            return method
        if isinstance(config.get("bits"), int):
            return f"{config['bits']} bits"
    return "by an unknown method"
