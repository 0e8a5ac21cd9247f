"""The measures of the checks, and the refusal of what is beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from hivtp.export.verify.checks import jaccard, refuse, relative_error, row_errors
from hivtp.runtime.vision.agreement import MIN_SPREAD, score_error
from hivtp_ops.errors import VerificationError


def test_jaccard_and_relative_error_of_known_values() -> None:
    assert jaccard(np.array([[0, 1, 2, -1]]), np.array([[1, 2, 3, -1]])) == 0.5
    assert jaccard(np.array([[0], [1]]), np.array([[1], [0]])) == 0.0
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 5.0])) == pytest.approx(np.sqrt(10) / 5)


def test_rows_have_errors_of_their_own() -> None:
    expected = np.array([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0], [0.0, 0.0]])
    found = np.array([[3.0, 9.0], [300.0, 400.0], [0.0, 0.0], [1.0, 0.0]])
    # A row of zeros that is found to be zero is left out; one that is not is as wrong as can be.
    assert row_errors(found[:3], expected[:3]).tolist() == [1.0, 0.0]
    assert row_errors(found, expected)[-1] > 1e6
    assert relative_error(found, expected) < 0.011


def test_scores_are_compared_with_how_much_they_differ() -> None:
    expected = np.array([[0.010, 0.012, 0.008], [0.5, 0.1, 0.3]])
    assert score_error(expected, expected) == 0.0
    # By 2 % of the scores, and by a tenth of how much those of the first tile differ.
    found = expected + np.array([[0.0002, -0.0002, 0.0], [0.0, 0.0, 0.0]])
    assert score_error(found, expected) == pytest.approx(0.1)
    mask = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 0.0]])
    assert score_error(found + mask, expected + mask) == pytest.approx(0.2)
    # Padding on one side only is an error.
    assert score_error(found + mask, expected) == np.inf
    assert np.isnan(score_error(np.full((2, 3), np.nan), expected))
    # Scores that are all the same tell nothing apart, whatever the last digits say.
    flat = np.full((1, 4), 0.25)
    assert score_error(flat + np.array([[1e-9, 0, 0, 0]]), flat) == pytest.approx(1e-9 / (0.5 * MIN_SPREAD))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (("error", 0.2, "at most", 0.1), "the graph differs from PyTorch: its error is 0.2, allowed is at most 0.1"),
        (("share", 0.8, "at least", 0.9), "its share is 0.8, allowed is at least 0.9; nothing was written"),
        (("error", float("nan"), "at most", 0.1), "its error is nan"),
        (("share", float("nan"), "at least", 0.1), "its share is nan"),
    ],
)
def test_what_is_beyond_its_limit_is_refused(check: tuple[str, float, str, float], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        refuse("the graph", [check])


def test_what_is_within_its_limit_or_was_not_measured_passes() -> None:
    refuse("the graph", [("a", 0.1, "at most", 0.1), ("b", 0.9, "at least", 0.9), ("c", None, "at most", 0.0)])
