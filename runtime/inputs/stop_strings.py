"""Stop strings: where an answer is cut, and the text that is held back while one may still come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    Args:
        strings: none of them empty.

    Attributes:
        found: the string that was found; None so far.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = strings
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text; returns the text that is certain to come before every stop string.

        After a stop string was found, this is the text before it; what comes after is dropped.
        """
        if not self._strings or not piece:
            return piece
        text = self._held + piece
        places = {string: place for string in self._strings if (place := text.find(string)) >= 0}
        if places:
            # The first that is complete, whatever the pieces; of several, the one that begins first.
            self.found = min(places, key=lambda string: (places[string] + len(string), places[string]))
            self._held = ""
            return text[: places[self.found]]
        num_held = max(_num_begun(text, string) for string in self._strings)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the text that was held back, after the last piece."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, string: str) -> int:
    """The length of the longest end of a text with which a string begins."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
