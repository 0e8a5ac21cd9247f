from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hivtp.engines.gpu import Gpu
from hivtp.engines.tensorrt.timing_cache import cache_file, default_cache_folder, read_cache, write_cache
from hivtp_ops.errors import EngineWarning
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import H200


def test_the_cache_is_that_of_one_version_on_one_gpu_with_one_driver():
    file = cache_file(Path("folder"), fake_gpu.library(), H200)
    assert file == Path("folder/tensorrt-11.4.0.106-nvidia-h200-sm90-580.65.06.cache")
    others = [
        cache_file(Path("folder"), fake_gpu.library(version="11.3.0.99"), H200),
        cache_file(Path("folder"), fake_gpu.library(name="tensorrt-rtx"), H200),
        cache_file(Path("folder"), fake_gpu.library(), Gpu("NVIDIA H200", (9, 0), driver="570.1", cuda="12.8")),
        cache_file(Path("folder"), fake_gpu.library(), Gpu("NVIDIA H200 NVL/../x", (9, 0), "580.65.06", "13.0")),
    ]
    assert len({file, *others}) == 5
    assert all(other.parent == Path("folder") for other in others)


def test_it_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "hivtp" / "timing"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "hivtp" / "timing"


def test_a_cache_is_kept_and_read_back_and_none_is_empty(tmp_path):
    file = tmp_path / "new" / "folder" / "x.cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_cache(file) == b""
        write_cache(file, b"measured")
        write_cache(file, b"measured again")
        assert read_cache(file) == b"measured again"
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_or_read_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(EngineWarning, match="cannot be written: .*; the next build will measure again"):
        write_cache(tmp_path / "file" / "x.cache", b"measured")
    (tmp_path / "x.cache").mkdir()
    with pytest.warns(EngineWarning, match=r"x\.cache cannot be read"):
        assert read_cache(tmp_path / "x.cache") == b""
