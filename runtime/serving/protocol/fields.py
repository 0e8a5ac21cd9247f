"""Checked reading of a JSON object: each value of the type and range that was wanted, or an error with its path."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hivtp.runtime.language.sampling import shortened
from hivtp.runtime.serving.protocol.errors import ApiError, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")


def parse_object(content: bytes) -> Fields:
    """Read a request's body.

    Raises:
        ApiError: it is not a JSON object.
    """
    try:
        values = json.loads(content, parse_constant=_refuse)
    except RecursionError as error:
        raise invalid("the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        # Without the text that the error quotes: it may be anything.
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise invalid(f"the body is not JSON{where}", code="invalid_json") from error
    return Fields.of(values)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Fields:
    """A JSON object. A field that is absent or null reads as None.

    Attributes:
        values: the object.
        place: its path in the request, "" for the request itself.
    """

    values: Mapping[str, Any]
    place: str = ""

    @classmethod
    def of(cls, value: Any, place: str = "") -> Fields:
        """An object at a place.

        Raises:
            ApiError: the value is something else.
        """
        if not isinstance(value, dict):
            raise invalid(f"{place or 'the body'} must be an object, not {shortened(value)}", place or None)
        return cls(value, place)

    def path(self, name: str) -> str:
        """The path of a field."""
        return f"{self.place}.{name}" if self.place else name

    def object(self, name: str) -> Fields | None:
        """An object in a field."""
        value = self.values.get(name)
        return None if value is None else Fields.of(value, self.path(name))

    def list(self, name: str) -> list[Any] | None:
        """A list."""
        return self._typed(name, list, "a list")

    def text(self, name: str) -> str | None:
        """A string."""
        return self._typed(name, str, "a string")

    def flag(self, name: str) -> bool | None:
        """True or false."""
        return self._typed(name, bool, "true or false")

    def whole(self, name: str, minimum: int, maximum: int | None = None) -> int | None:
        """A whole number in a range."""
        value = self.values.get(name)
        if value is None:
            return None
        wanted = f"a whole number, {minimum} or more" if maximum is None else f"a whole number, {minimum} to {maximum}"
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < minimum or (maximum is not None and value > maximum):
            raise self.wrong(name, wanted)
        return int(value)

    def real(self, name: str, minimum: float, maximum: float | None = None, *, above: bool = False) -> float | None:
        """A number in a range; `above` leaves the minimum out."""
        value = self.values.get(name)
        if value is None:
            return None
        wanted = f"a number {'above' if above else 'from'} {minimum:g}"
        wanted += "" if maximum is None else f" to {maximum:g}"
        is_real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not is_real or value < minimum or (above and value == minimum) or (maximum is not None and value > maximum):
            raise self.wrong(name, wanted)
        return float(value)

    def wrong(self, name: str, wanted: str) -> ApiError:
        """The error of a field that is other than was wanted."""
        return invalid(f"{self.path(name)} must be {wanted}, not {shortened(self.values.get(name))}", self.path(name))

    def _typed(self, name: str, kind: type[T], wanted: str) -> T | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.wrong(name, wanted)
        return value
