"""The text that calibrates: the default one, a file of the user, and tokenizers that cannot read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint, make_tokenizer
from benchmarks.trained.packages import text as evaluation_text
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.decoder.rounding import text as texts
from hivtp.export.decoder.rounding.text import DEFAULT_SOURCE, SEQUENCE_TOKENS, calibration_text, readable_ids
from hivtp.export.verify.language import NUM_DECODED_TOKENS, NUM_PREFILL_TOKENS
from hivtp.export.verify.text import ANSWER, check_token_ids
from hivtp_ops.errors import SpecError
from tests.support.config import text_config

if TYPE_CHECKING:
    from pathlib import Path


class WordTokenizer:
    """Knows no word."""

    unk_token_id = 0

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0 for _ in text.split()]}


def test_the_default_text_is_there_and_long_enough() -> None:
    found = calibration_text(make_tokenizer(512), text_config(), None)
    assert found is not None
    assert found.source == DEFAULT_SOURCE
    assert found.token_ids.shape == (texts.NUM_SEQUENCES, SEQUENCE_TOKENS)
    # From all over it: no two pieces are alike.
    assert len({tuple(row) for row in found.token_ids.tolist()}) == texts.NUM_SEQUENCES


def test_it_is_not_what_the_benchmark_evaluates_on_nor_what_exports_check_on() -> None:
    default = texts._default_text()
    assert default is not None
    for sentence in [*filter(None, evaluation_text().splitlines()), *ANSWER.split(". ")]:
        assert sentence not in default


def test_a_wide_model_reads_less() -> None:
    found = calibration_text(make_tokenizer(512), text_config(hidden_size=4096), None)
    assert found is not None
    assert found.token_ids.shape == (texts.NUM_SEQUENCES_OF_WIDE, SEQUENCE_TOKENS)


def test_a_short_context_makes_short_pieces() -> None:
    found = calibration_text(make_tokenizer(512), text_config(max_position_embeddings=40), None)
    assert found is not None
    assert found.token_ids.shape[1] == 40


def test_a_file_is_read_and_named(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("\n".join(f"Line {index} of a letter to a friend." for index in range(300)), encoding="utf-8")
    found = calibration_text(make_tokenizer(512), text_config(), file)
    assert found is not None
    assert found.source == "letters.txt"
    assert found.token_ids.dtype == np.int64
    assert found.token_ids.max() < 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Too short.", "holds [0-9]+ tokens, and a calibration takes at least 1024: give a longer text"),
        (b"", "give"),
        (b"\xff\xfe\x00" * 4000, "is not in UTF-8"),
    ],
)
def test_a_file_that_is_no_use_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=message) as caught:
        calibration_text(make_tokenizer(512), text_config(), file)
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(SpecError, match=r"the calibration text .* cannot be read"):
            calibration_text(make_tokenizer(512), text_config(), file)


def test_a_tokenizer_of_something_else_reads_no_default_text_and_refuses_a_file(tmp_path: Path) -> None:
    assert calibration_text(WordTokenizer(), text_config(), None) is None
    file = tmp_path / "words.txt"
    file.write_text("some words " * 2000, encoding="utf-8")
    with pytest.raises(SpecError, match="does not know; give another text"):
        calibration_text(WordTokenizer(), text_config(), file)
    # Ids beyond the vocabulary of the model.
    assert readable_ids(make_tokenizer(512), "plain words", 5) is None


def test_decoders_are_checked_on_a_question_and_an_answer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint"))
    processor = Processor.open(checkpoint)
    token_ids = check_token_ids(checkpoint, processor)
    assert token_ids is not None
    assert len(token_ids) == NUM_PREFILL_TOKENS + NUM_DECODED_TOKENS
    text = processor.tokenizer.decode(token_ids)
    assert "USER" in text
    assert "A lighthouse" in text
