from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivtp.runtime.inputs.stop_strings import StopStrings

WORDS = st.text("ab ", max_size=12)


def ended(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Letter by letter: the text before the first string that is complete, and that string."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            found = max(complete, key=len)
            return text[: end - len(found)], found
    return text, None


@given(st.lists(WORDS, max_size=8), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=4))
def test_text_in_any_pieces_is_cut_before_the_first_string_that_is_complete(
    pieces: list[str], strings: list[str]
) -> None:
    stops, given_out = StopStrings(strings), ""
    for number, piece in enumerate(pieces, 1):
        given_out += stops.push(piece)
        text = "".join(pieces[:number])
        expected, found = ended(text, strings)
        assert stops.found == found
        if found is not None:
            assert given_out == expected
            return
        # Held back is what may be the beginning of a string, and no more.
        held = text[len(given_out) :]
        assert given_out + held == text
        begun = [length for string in strings for length in range(1, len(string)) if text.endswith(string[:length])]
        assert len(held) == max(begun, default=0)
    assert given_out + stops.finish() == "".join(pieces)
    assert stops.found is None
    assert stops.finish() == ""


@pytest.mark.parametrize(
    ("pieces", "strings", "given_out", "found"),
    [
        (["a s", "to", "p b"], ["stop"], ["a ", "", ""], "stop"),
        (["abab", "ac"], ["abac"], ["ab", ""], "abac"),
        (["xbc"], ["abc", "bc"], ["x"], "bc"),
        (["xab", "c"], ["abc", "bc"], ["x", ""], "abc"),
        (["one\n\ntwo"], ["\n\n", "\n"], ["one"], "\n"),
        (["st", "x"], ["stop"], ["", "stx"], None),
        (["猫🐈"], ["🐈"], ["猫"], "🐈"),
    ],
)
def test_examples(pieces: list[str], strings: list[str], given_out: list[str], found: str | None) -> None:
    stops = StopStrings(strings)
    assert [stops.push(piece) for piece in pieces] == given_out
    assert stops.found == found
