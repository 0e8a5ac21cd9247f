from __future__ import annotations

import pytest

from hivtp.engines.files import write_whole


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


def test_a_folder_that_is_none_is_an_os_error(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        write_whole(tmp_path / "folder" / "file", b"content")
