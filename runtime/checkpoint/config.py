"""The config of a checkpoint: read without running its code, and reduced to what changes the computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_json
from hivtp.runtime.checkpoint.original_layout import converted, is_original
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# What transformers adds when it saves, what only training or generation uses, and what the shapes of the weights tell.
_NOT_COMPUTED_WITH = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("attention_dropout", "initializer_factor", "initializer_range", "pretraining_tp", "return_dict"),
    *("output_attentions", "output_hidden_states", "problem_type", "id2label", "label2id", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "ignore_index", "image_seq_length", "vocab_size"),
}


def read_config(folder: Path) -> Any:
    """The config of a folder, as transformers reads it; no code that the folder may hold is run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    import transformers

    raw = read_raw_config(folder)
    try:
        if is_original(raw):
            return transformers.AutoConfig.for_model(**converted(raw))
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything
        raise CheckpointError(f"{folder / 'config.json'} cannot be read ({error})") from error


def read_raw_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        CheckpointError: it is missing, or holds no JSON object.
    """
    file = folder / "config.json"
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} cannot be read (it holds a JSON {type(raw).__name__}, expected an object)")
    return raw


def settings_of(config: Any) -> dict[str, Any]:
    """What a config says of the computation: values other than the defaults of its class, parts within parts.

    Numbers are floats, since one program writes 10000 and another 10000.0. Sizes that the shapes of the weights tell
    may be among them.
    """
    found, defaults = config.to_dict(), type(config)().to_dict()
    settings: dict[str, Any] = {"model_type": config.model_type}
    for name in found.keys() - _NOT_COMPUTED_WITH:
        part, value = getattr(config, name, None), _plain(found[name])
        if hasattr(part, "to_dict"):
            settings[name] = settings_of(part)
        elif not name.startswith("_") and value != _plain(defaults.get(name)):
            settings[name] = value
    return settings


def _plain(value: Any) -> Any:
    """A value of a config in one form."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, bool | str | None) else str(value)
