"""Frozen dataclasses from JSON, checked key by key."""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Mapping


def read_record(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Make a dataclass of a JSON object; its hints must resolve at run time, and lists become tuples.

    Raises:
        ValueError: keys are missing or unknown.
        TypeError: a value is of another kind than the hint says.
    """
    hints = get_type_hints(kind)
    if set(values) != set(hints):
        raise ValueError(f"{kind.__name__} has keys {sorted(values)}, expected {sorted(hints)}")
    values = {name: _as_tuple(value) for name, value in values.items()}
    for name, hint in hints.items():
        expected = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
        if not isinstance(values[name], expected):
            raise TypeError(f"{name} of {kind.__name__} is {values[name]!r}, expected {hint}")
    return kind(**values)


def _as_tuple(value: Any) -> Any:
    """JSON has no tuples; the sequences of records are all tuples."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
