from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from hivtp.engines.tensorrt.library import MODULES, load_library
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORKING = """
class ILogger:
    ERROR, WARNING = 1, 2

__version__ = {version!r}
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in MODULES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    load_library.cache_clear()
    yield
    load_library.cache_clear()
    for module in MODULES.values():
        sys.modules.pop(module, None)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, code: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("name", MODULES)
def test_a_library_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError, match=rf"{MODULES[name]} is not installed.*hivtp\[{name}\]"):
        load_library(name)


def test_an_unknown_library_is_refused():
    with pytest.raises(EngineError, match="'tensorflow'; there are tensorrt, tensorrt-rtx"):
        load_library("tensorflow")


@pytest.mark.parametrize(
    "code",
    [
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
        "raise OSError('libnvinfer.so.11: cannot open shared object file')",
        "raise FileNotFoundError('Could not find: libnvinfer.so.11')",
    ],
)
def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path, code):
    install(monkeypatch, tmp_path, "tensorrt", code)
    with pytest.raises(EngineError, match=r"tensorrt is installed but does not load: .*libnvinfer"):
        load_library("tensorrt")


@pytest.mark.parametrize("version", ["10.12.0.36", "8.6.1.post1", "9.3"])
def test_a_library_that_is_too_old_is_refused(monkeypatch, tmp_path, version):
    install(monkeypatch, tmp_path, "tensorrt", WORKING.format(version=version))
    with pytest.raises(EngineError, match=rf"tensorrt {version} is too old; 10\.13 is the oldest"):
        load_library("tensorrt")


@pytest.mark.parametrize("version", ["10.13.0.35", "10.13.3.9.post1", "11.0.0.114"])
def test_a_library_loads_once_and_its_last_errors_are_kept(monkeypatch, tmp_path, version):
    install(monkeypatch, tmp_path, "tensorrt", WORKING.format(version=version))
    library = load_library("tensorrt")
    assert (library.name, library.version, library.builds_without_gpu) == ("tensorrt", version, False)
    assert load_library("tensorrt") is library
    library.logger.log(2, "only a warning")
    for number in range(8):
        library.logger.log(1, f"error {number}\n")
    error = library.failure("cannot build")
    assert str(error) == f"tensorrt {version} cannot build: error 3; error 4; error 5; error 6; error 7"
    assert str(library.failure("cannot")) == f"tensorrt {version} cannot: it gives no reason"
