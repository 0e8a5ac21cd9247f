from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.trained.gguf import FLOAT32, Q4_1, Q8_0, dequantized, read_gguf

if TYPE_CHECKING:
    from pathlib import Path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_metadata_and_tensors_are_read_back(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += string("name") + struct.pack("<I", 8) + string("tiny")
    head += string("sizes") + struct.pack("<IIQII", 9, 4, 2, 7, 9)
    # The shape stands from the fastest axis to the slowest.
    head += string("matrix") + struct.pack("<IQQIQ", 2, 3, 2, FLOAT32, 0)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + matrix.tobytes())
    metadata, tensors = read_gguf(file)
    assert metadata == {"name": "tiny", "sizes": [7, 9]}
    assert list(tensors) == ["matrix"]
    np.testing.assert_array_equal(tensors["matrix"], matrix)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_gguf(file)


def test_blocks_are_scaled_back() -> None:
    numbers = np.arange(32)
    packed = ((numbers[:16] % 16) | ((numbers[16:] % 16) << 4)).astype(np.uint8)
    four_bits = np.frombuffer(np.array([0.5, -2], np.float16).tobytes() + packed.tobytes(), np.uint8)
    np.testing.assert_array_equal(dequantized(four_bits, Q4_1, 32), numbers % 16 * 0.5 - 2)
    signed = (numbers - 16).astype(np.int8)
    eight_bits = np.frombuffer(np.array([0.25], np.float16).tobytes() + signed.tobytes(), np.uint8)
    np.testing.assert_array_equal(dequantized(eight_bits, Q8_0, 32), signed * 0.25)
    with pytest.raises(ValueError, match="type 12"):
        dequantized(four_bits, 12, 32)
