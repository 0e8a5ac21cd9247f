from __future__ import annotations

import os

import numpy as np
import pytest

from hivtp.engines.files import map_array, parse_json, read_regular, write_whole


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "file"
    for content in (b"first", b"", memoryview(b"second")):
        write_whole(file, content)
        assert file.read_bytes() == bytes(content)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_whole(file, "text, which no binary file takes")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_a_file_in_the_place_of_a_folder_is_an_os_error(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        write_whole(tmp_path / "folder" / "file", b"content")


def test_a_regular_file_is_read_up_to_its_bound(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    # A bound far beyond memory costs nothing.
    for most in (5, 10**30):
        assert read_regular(file, most) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, and 4 are allowed"):
        read_regular(file, 4)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path, kind):
    file = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        read_regular(file, 100)


@pytest.mark.parametrize("content", [b'{"a": [1, null, "\\u00e9"]}', b'\xef\xbb\xbf{"a": [1, null, "\xc3\xa9"]}'])
def test_json_is_read_with_and_without_a_byte_order_mark(content):
    assert parse_json(content) == {"a": [1, None, "é"]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"1" * 5000, b'"\\ud800"', b'{"\\udfff": 1}', b"\xff\xfe1\x00"]
    + [b"[" * depth + b"]" * depth for depth in (101, 1000, 100_000)]
    + [b'{"a":' * 101 + b"1" + b"}" * 101],
)
def test_json_that_python_could_not_work_with_is_a_value_error(content):
    with pytest.raises(ValueError, match=r".+"):
        parse_json(content)


def test_an_array_is_mapped_and_not_read(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for other in (array, np.asfortranarray(array), array.astype(np.float16), array.astype(">f8")):
        np.save(tmp_path / "array.npy", other)
        found = map_array(tmp_path / "array.npy", (3, 4))
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
        assert found.dtype == other.dtype
        np.testing.assert_array_equal(found, array)
    with pytest.raises(ValueError, match=r"array.npy holds .* of shape \[3, 4\], the manifest says .* \[4, 3\]"):
        map_array(tmp_path / "array.npy", (4, 3))
