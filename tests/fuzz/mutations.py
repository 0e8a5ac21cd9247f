"""Damage, to bytes and to the structure of JSON. It follows from a random generator, so each case can be repeated."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

# What a field may hold instead of what it should.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308, 1e999, -1e999, float("nan")),
    *("", " ", "x", "0", "-1", "auto", "llava", "llava_next", "fp16", "none", "vision/model.onnx", "manifest.json"),
    *("..", "../..", "/etc/passwd", "/dev/zero", "vision/..", "a\0b", "a\\b", "C:/x", "\u202e", "\ud800", "\U0001f600"),
    *("x" * 300, "<image>", "<image>" * 50, "</s>", "{{ 7 * 7 }}", "{% for i in range(99999999) %}x{% endfor %}"),
    *([], {}, [[]], [None], [0, 0], [1, 2, 3], ["a", 1, None], {"a": 1}, {"": None}, {"__class__": "x"}),
)


def nested(depth: int, in_objects: bool) -> Any:
    """A value inside this many lists or objects."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if in_objects else [value]
    return value


def any_value(random: Random) -> Any:
    """Something that is rarely what was meant."""
    if random.random() < 0.05:
        return nested(random.choice([5, 50, 99, 100, 101, 500]), random.random() < 0.5)
    return copy.deepcopy(random.choice(VALUES))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in JSON."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutated_json(value: Any, random: Random, num_changes: int = 1) -> Any:
    """The same JSON with some values replaced, removed, added, or exchanged for others of it."""
    root = {"root": copy.deepcopy(value)}
    for _ in range(num_changes):
        path = ("root", *random.choice(places(root["root"])))
        parent: Any = root
        for key in path[:-1]:
            parent = parent[key]
        match random.randrange(6):
            case 0 if len(path) > 1:
                del parent[path[-1]]
            case 1:
                source: Any = root
                for key in ("root", *random.choice(places(root["root"]))):
                    source = source[key]
                parent[path[-1]] = copy.deepcopy(source)
            case 2 if isinstance(parent[path[-1]], dict):
                parent[path[-1]][random.choice(["", "file", "colour", "num_layers"])] = any_value(random)
            case 2 | 3 if isinstance(parent[path[-1]], list):
                parent[path[-1]] *= random.choice([0, 2, 50])
            case 4 if isinstance(parent[path[-1]], str):
                content = parent[path[-1]].encode(errors="replace")
                parent[path[-1]] = mutated_bytes(content, random).decode(errors="replace")
            case 4 if isinstance(parent[path[-1]], int | float):
                parent[path[-1]] = changed_number(parent[path[-1]], random)
            case _:
                parent[path[-1]] = any_value(random)
    return root["root"]


def changed_number(number: float, random: Random) -> Any:
    """A number near another one, or far from it."""
    if isinstance(number, float) and not abs(number) < 1e300:
        return 0
    change = random.choice([lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: n * 2, lambda n: n * 1000, float])
    return change(number)


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """The same bytes with some changed, cut out, put in or doubled."""
    found = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        start = random.randrange(len(found) + 1)
        length = random.choice([1, 1, 2, 4, 16, 100])
        match random.randrange(7):
            case 0:
                del found[start:]
            case 1:
                del found[start : start + length]
            case 2:
                found[start:start] = random.randbytes(length)
            case 3:
                found[start:start] = found[start : start + length]
            case 4:
                found[start : start + 4] = random.choice(
                    [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
                )
            case _ if start < len(found):
                found[start] = random.choice([found[start] ^ 1 << random.randrange(8), random.randrange(256), 0, 255])
    return bytes(found)
