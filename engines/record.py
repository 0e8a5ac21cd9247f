"""Frozen dataclasses from JSON, checked value by value against their type hints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_record(kind: type[T], values: Any, name: str = "") -> T:
    """Make a dataclass of a JSON object.

    Args:
        kind: the dataclass. Its hints resolve at run time, and are of dataclasses, str, int, float, bool, None, Any,
            literal strings, tuples, mappings from str, and unions of these.
        values: the object, as `json.loads` gives it.
        name: where it stands, for messages.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type than the hint says.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or kind.__name__} is {shown(values)}, expected an object")
    if set(values) != set(hints):
        missing, unknown = sorted(set(hints) - set(values)), sorted(map(str, set(values) - set(hints)))
        problems = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {shown(unknown)}"] * bool(unknown)
        raise ValueError(f"{name or kind.__name__} {' and '.join(problems)}")
    assert is_dataclass(kind), "records are dataclasses"
    prefix = f"{name}." if name else ""
    return kind(**{item.name: _read(hints[item.name], values[item.name], prefix + item.name) for item in fields(kind)})


def _read(hint: Any, value: Any, name: str) -> Any:
    if hint is Any:
        return value
    if is_dataclass(hint):
        assert isinstance(hint, type), "a hint is a class"
        return read_record(hint, value, name)
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _read_union(get_args(hint), value, name)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ValueError(f"{name} is {shown(value)}, expected one of {', '.join(get_args(hint))}")
        return value
    if origin is tuple:
        return _read_tuple(get_args(hint), value, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {shown(value)}, expected an object")
        item = get_args(hint)[1]
        return {str(key): _read(item, entry, f"{name}[{shown(key)}]") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, name)
    # In Python True is an integer, and in JSON it is not.
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not is_right or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {shown(value)}, expected {'null' if hint is NoneType else hint.__name__}")
    return value


def _read_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and NoneType in options:
        return None
    others = [option for option in options if option is not NoneType]
    problem: ValueError | None = None
    for option in others:
        try:
            return _read(option, value, name)
        except ValueError as error:
            problem = problem or error
    raise problem or ValueError(f"{name} is {shown(value)}, expected null")


def _read_tuple(items: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {shown(value)}, expected a list")
    if items[1:] == (Ellipsis,):
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{name} holds {len(value)} values, expected {len(items)}")
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_read(item, entry, f"{name}[{index}]") for index, (item, entry) in pairs)


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large a number") from error


def shown(value: Any) -> str:
    """A value for a message, however long or deep it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
