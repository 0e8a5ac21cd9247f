"""The tokenizer of a checkpoint: whether transformers can make a fast one of its files, and it fits the model."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import read_regular
from hivtp_ops.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

FAST_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
MAX_VOCABULARY_BYTES = 64 * 2**20
# A token in base 64 and its rank, on each line.
_TIKTOKEN_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* \d+\r?\n")
SAVE_FAST = (
    "take that file from where the model was published, or write it where the checkpoint was made: "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a vocabulary that transformers cannot convert here.

    Raises:
        CheckpointError: it is of tiktoken, or cannot be read.
        MissingExtraError: it is of sentencepiece, which is not installed.
    """
    vocabulary = folder / SENTENCEPIECE_FILE
    if (folder / FAST_FILE).exists() or not vocabulary.exists():
        return
    try:
        content = read_regular(vocabulary, MAX_VOCABULARY_BYTES)
    except OSError as error:
        raise CheckpointError(f"{vocabulary} cannot be read: {error.strerror or error}") from error
    if _TIKTOKEN_LINE.match(content):
        raise CheckpointError(
            f"{folder} has no {FAST_FILE}, and its {SENTENCEPIECE_FILE} is a vocabulary of tiktoken, which does not "
            f"say how text is split; {SAVE_FAST} with tiktoken and blobfile installed"
        )
    if importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtraError("sentencepiece", "export")


def check_tokenizer(folder: Path, tokenizer: Any, image_token: str, config: Any) -> None:
    """Refuse a tokenizer that does not fit the model.

    Args:
        folder: of the checkpoint, for messages.
        tokenizer: as transformers opened it.
        image_token: the placeholder of an image.
        config: of the checkpoint.

    Raises:
        CheckpointError: it is not a fast one, gives the image token another id than the config, or has tokens that the
            embeddings have no vector for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{folder} has no {FAST_FILE}, and transformers cannot make one of its files; {SAVE_FAST}"
        )
    num_rows = config.text_config.vocab_size
    # The image token comes first, so that the message speaks of it.
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_token_id != config.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {image_token!r} the id {image_token_id}, "
            f"the config's image_token_index is {config.image_token_id}; they do not belong together"
        )
    added = {int(token_id): str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    for token_id, token in {image_token_id: image_token, **added}.items():
        if not 0 <= token_id < num_rows:
            raise CheckpointError(
                f"{folder}: the tokenizer has {token!r} as token {token_id}, and the embeddings end with token "
                f"{num_rows - 1}; make them longer with transformers (model.resize_token_embeddings) and save the "
                "model again, or take the token out of the tokenizer's files"
            )
