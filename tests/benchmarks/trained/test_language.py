from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.pipelines import load_pipeline
from benchmarks.trained.language import NUM_PREFILL_TOKENS, PIECE_TOKENS, compare, pieces_of, read

if TYPE_CHECKING:
    from pathlib import Path


def test_a_text_is_cut_into_whole_pieces() -> None:
    pieces = pieces_of(range(2 * PIECE_TOKENS + 5))
    assert pieces.shape == (2, PIECE_TOKENS)
    assert pieces[1, 0] == PIECE_TOKENS


def test_pieces_are_read_as_each_alone_would_be(exact_bundle: Path) -> None:
    with load_pipeline(exact_bundle, 1) as pipeline:
        language = pipeline.model.language
        pieces = np.random.default_rng(0).integers(50, size=(2, NUM_PREFILL_TOKENS + 4))
        logits = read(language, pieces)
        assert logits.shape[:2] == (2, 4)
        for piece, found in zip(pieces, logits, strict=True):
            for position, expected in enumerate(found):
                slots = language.open_slots(1, PIECE_TOKENS)
                num = NUM_PREFILL_TOKENS + position
                alone = slots.prefill(0, language.embed(piece[:num].tolist()), num)
                np.testing.assert_allclose(alone, expected, atol=1e-4)


def test_costs_and_agreement_of_logits() -> None:
    expected = np.zeros((1, 2, 4), np.float32)
    expected[0, 0, 1] = expected[0, 1, 2] = 3
    found = expected.copy()
    found[0, 1] = [5, 0, 0, 0]
    targets = np.array([[1, 2]])
    [same] = compare(expected, expected, targets)
    assert same["nats"] == pytest.approx(np.log(1 + 3 * np.exp(-3)), rel=1e-5)
    assert (same["same_token"], same["logits_error"]) == (1, 0)
    [other] = compare(found, expected, targets)
    assert other["nats"] > same["nats"]
    assert other["same_token"] == 0.5
    assert other["logits_error"] == pytest.approx(np.sqrt(34 / 18))
