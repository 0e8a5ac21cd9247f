"""The processor of a checkpoint in transformers, opened without running code of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_json, read_regular
from hivtp.export.checkpoint.onevision_processor import open_onevision_processor
from hivtp.export.checkpoint.tokenizer import FAST_FILE, SAVE_FAST, check_tokenizer_files
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# What transformers reads of a processor; a stranger's files are looked at before it does.
JSON_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
OTHER_FILES = ("chat_template.jinja", "additional_chat_templates/*.jinja", "merges.txt", "tokenizer.model")
MAX_OTHER_BYTES = 64 * 2**20


def open_original(folder: Path, family: str) -> Any:
    """The processor as transformers opens it, with the backend for images that runs everywhere.

    Args:
        folder: of the checkpoint.
        family: its architecture.

    Raises:
        CheckpointError: a file is missing or damaged, or the processor is Python code of the checkpoint.
        MissingExtraError: sentencepiece is needed and not installed.
    """
    from transformers import AutoProcessor

    check_files(folder)
    check_tokenizer_files(folder)
    try:
        if family == "llava_onevision":
            processor = open_onevision_processor(folder)
        else:
            processor = AutoProcessor.from_pretrained(
                folder, local_files_only=True, backend="pil", trust_remote_code=False
            )
        is_whole = processor.tokenizer is not None and processor.image_processor is not None
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"the processor of {folder} is Python code of the checkpoint, which is never run; save it as a "
                "processor of transformers first"
            ) from error
        if not (folder / FAST_FILE).exists():
            raise CheckpointError(
                f"{folder} has no {FAST_FILE}, and transformers cannot make a tokenizer of its other files; {SAVE_FAST}"
            ) from error
        raise CheckpointError(
            f"{folder} has no usable processor ({_shortened(error)}); "
            "it needs tokenizer.json, tokenizer_config.json and preprocessor_config.json"
        ) from error
    if not is_whole:
        raise CheckpointError(f"{folder} has a processor without a tokenizer or without an image processor")
    return processor


def check_files(folder: Path) -> None:
    """Refuse files that would block, fill the memory or be nested without end.

    Raises:
        CheckpointError: which file.
    """
    files = [folder / name for name in JSON_FILES]
    others = [file for form in OTHER_FILES for file in sorted(folder.glob(form))]
    for file in (*filter(lambda file: file.exists(), files), *others):
        try:
            content = read_json(file) if file.suffix == ".json" else {"": read_regular(file, MAX_OTHER_BYTES)}
        except (OSError, ValueError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else f"it is not valid JSON: {error}"
            raise CheckpointError(f"{file} cannot be read: {reason}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, expected an object")


def _shortened(error: Exception) -> str:
    text = " ".join(f"{error}".split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."
