from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  the hints are read at run time
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from hivtp.engines.record import read_record, shown


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Whole:
    name: str
    share: float
    is_new: bool
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    many: tuple[Part, ...]
    parts: Mapping[str, Part]
    maybe: Part | None
    rest: Any


VALUES = {
    "name": "x",
    "share": 1,
    "is_new": False,
    "kind": "a",
    "pair": [1, "y"],
    "many": [{"size": 1}, {"size": 2}],
    "parts": {"left": {"size": 3}},
    "maybe": None,
    "rest": {"anything": [None]},
}


def test_a_record_is_read_with_everything_in_it():
    found = read_record(Whole, VALUES)
    assert found == Whole(
        "x", 1.0, False, "a", (1, "y"), (Part(1), Part(2)), {"left": Part(3)}, None, {"anything": [None]}
    )
    assert isinstance(found.share, float)
    assert read_record(Whole, VALUES | {"maybe": {"size": 4}}).maybe == Part(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name is 3, expected str"),
        ({"share": True}, "share is True, expected float"),
        ({"share": float("nan")}, "share is nan, expected float"),
        ({"share": float("inf")}, "share is inf, expected float"),
        ({"share": 10**400}, "share is too large a number"),
        ({"is_new": 1}, "is_new is 1, expected bool"),
        ({"kind": "c"}, "kind is 'c', expected one of a, b"),
        ({"kind": {}}, "kind is {}, expected one of a, b"),
        ({"pair": [1]}, "pair holds 1 values, expected 2"),
        ({"pair": [True, "y"]}, r"pair\[0\] is True, expected int"),
        ({"pair": "1y"}, "pair is '1y', expected a list"),
        ({"many": [{"size": 1}, {}]}, r"many\[1\] lacks size"),
        ({"many": [None]}, r"many\[0\] is None, expected an object"),
        ({"parts": {"left": {"size": "3"}}}, r"parts\['left'\].size is '3', expected int"),
        ({"parts": []}, r"parts is \[\], expected an object"),
        ({"maybe": 3}, "maybe is 3, expected an object"),
        ({"colour": "red"}, r"Whole has unknown \['colour'\]"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(changes, message):
    with pytest.raises(ValueError, match=message):
        read_record(Whole, VALUES | changes)


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_what_is_not_an_object_is_refused(values):
    with pytest.raises(ValueError, match=r"Whole is .*, expected an object"):
        read_record(Whole, values)


def test_a_value_is_shown_however_long_or_deep_it_is():
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(deep) == "a value of type list"
    assert shown(10**5000) == "a value of type int"
    assert len(shown("x" * 10**6)) < 100
