"""The text that calibrates rounding: a file of the user, or one that every Python has; as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# What `help("NUMBERS")` and the like print: prose of the Python reference, in the standard library.
DEFAULT_SOURCE = "the help topics of Python"
NUM_SEQUENCES, SEQUENCE_TOKENS = 32, 256
# Of a wide model, for which the half takes minutes.
WIDE, NUM_SEQUENCES_OF_WIDE = 2048, 16
# Fewer show too little of a model's inputs.
MIN_TOKENS = 1024
# Of tokens that a tokenizer does not know in a text of its language.
MAX_UNKNOWN_SHARE = 0.02
# Of a text, as many as hold the tokens in any language model's vocabulary, and no more than is quickly read.
MAX_CHARACTERS = NUM_SEQUENCES * SEQUENCE_TOKENS * 8
MAX_FILE_BYTES = 2**26


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate with.

    Attributes:
        source: which, for people.
        token_ids: [sequences, length] int64, taken from all over the text.
    """

    source: str
    token_ids: NDArray[np.int64]


def calibration_text(tokenizer: Any, config: Any, file: Path | None) -> CalibrationText | None:
    """Read the text of a file, or the default text.

    Args:
        tokenizer: a fast transformers tokenizer.
        config: of the language model.
        file: in UTF-8; None takes the default.

    Returns:
        The text; None where the tokenizer cannot read the default one: it was made for something else.

    Raises:
        SpecError: the file cannot be read, is not text, or is too short.
    """
    text = _default_text() if file is None else _sampled(_read(file).splitlines())
    token_ids = None if text is None else readable_ids(tokenizer, text, config.vocab_size)
    if token_ids is not None and len(token_ids) >= MIN_TOKENS:
        source = DEFAULT_SOURCE if file is None else file.name
        num_sequences = NUM_SEQUENCES if config.hidden_size <= WIDE else NUM_SEQUENCES_OF_WIDE
        return CalibrationText(source, _sequences(token_ids, num_sequences, config.max_position_embeddings))
    if file is None:
        return None
    if token_ids is None:
        raise SpecError(
            f"{file} holds characters that the tokenizer of this checkpoint does not know; give another text"
        )
    raise SpecError(
        f"{file} holds {len(token_ids)} tokens, and a calibration takes at least {MIN_TOKENS}: give a longer text"
    )


def readable_ids(tokenizer: Any, text: str, vocab_size: int) -> list[int] | None:
    """The token ids of a text; None where the tokenizer or the language model does not know it."""
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_unknown = sum(token_id in (tokenizer.unk_token_id, None) for token_id in token_ids)
    if not token_ids or num_unknown > MAX_UNKNOWN_SHARE * len(token_ids) or max(token_ids) >= vocab_size:
        return None
    return token_ids


def _sequences(token_ids: list[int], num_sequences: int, context_length: int) -> NDArray[np.int64]:
    """Pieces [sequences, length] of a text, at even distances."""
    length = min(SEQUENCE_TOKENS, context_length)
    num = min(num_sequences, len(token_ids) // length)
    starts = [index * (len(token_ids) // num) for index in range(num)]
    return np.array([token_ids[start : start + length] for start in starts], np.int64)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_FILE_BYTES).decode("utf-8")
    except OSError as error:
        raise SpecError(f"the calibration text {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the calibration text {file} is not in UTF-8 ({error.reason}); give a text file") from error


def _default_text() -> str | None:
    """Its paragraphs, one to a line, without code and tables; None where this Python comes without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return None
    paragraphs = (" ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n"))
    return _sampled([text for text in paragraphs if text[:1].isupper() and text.endswith(".")])


def _sampled(lines: list[str]) -> str:
    """As many of the lines as are needed, in order and from all over the text."""
    step = max(1, sum(map(len, lines)) // MAX_CHARACTERS)
    return "\n".join(lines[::step])
