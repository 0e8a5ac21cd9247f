"""Reading of GGUF, the file of llama.cpp: its metadata and its tensors in float32."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAGIC = b"GGUF"
ALIGNMENT = 32
# Formats of `struct` by the number of a type; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOAT32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32
BLOCK_BYTES = {Q4_1: 20, Q8_0: 34}


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Read a file whose tensors are in float32, Q4_1 or Q8_0.

    Returns:
        The metadata, and the tensors by name with their last axis contiguous, as PyTorch has them.

    Raises:
        ValueError: it is another file, or holds another type.
    """
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise ValueError(f"{file} is not a GGUF file")
        _version, num_tensors, num_keys = _number(stream, "I"), _number(stream, "Q"), _number(stream, "Q")
        metadata = {}
        for _ in range(num_keys):
            key = _string(stream)
            metadata[key] = _value(stream, _number(stream, "I"))
        infos = []
        for _ in range(num_tensors):
            name = _string(stream)
            shape = [_number(stream, "Q") for _ in range(_number(stream, "I"))]
            infos.append((name, shape[::-1], _number(stream, "I"), _number(stream, "Q")))
        start = math.ceil(stream.tell() / ALIGNMENT) * ALIGNMENT
    data = np.memmap(file, np.uint8, "r")
    return metadata, {
        name: dequantized(data[start + offset :], kind, math.prod(shape)).reshape(shape)
        for name, shape, kind, offset in infos
    }


def dequantized(data: NDArray[np.uint8], kind: int, num_values: int) -> NDArray[np.float32]:
    """The values that stand at the start of some bytes, [num_values].

    Raises:
        ValueError: the type is not supported.
    """
    if kind == FLOAT32:
        return np.array(data[: 4 * num_values]).view(np.float32)
    if kind not in BLOCK_BYTES:
        raise ValueError(f"tensors of GGUF's type {kind} are not supported")
    size = BLOCK_BYTES[kind]
    blocks = np.array(data[: num_values // BLOCK * size]).reshape(-1, size)
    if kind == Q8_0:
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        values: NDArray[np.float32] = blocks[:, 2:].copy().view(np.int8) * scales
        return values.ravel()
    scales, minima = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    packed = blocks[:, 4:]
    numbers = np.concatenate([packed & 15, packed >> 4], axis=1)
    values = (numbers * scales + minima).astype(np.float32)
    return values.ravel()


def _number(stream: BinaryIO, form: str) -> Any:
    [value] = struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))
    return value


def _string(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "Q")).decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(stream)
    if kind == ARRAY:
        kind, length = _number(stream, "I"), _number(stream, "Q")
        return [_value(stream, kind) for _ in range(length)]
    return _number(stream, SCALARS[kind])
