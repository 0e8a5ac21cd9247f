from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from hivtp.export.staging import renaming
from hivtp.export.staging.renaming import exchange, rename_new

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["renameat2", "unsupported", "absent"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that knows renames that replace nothing; a file system that does not; a kernel that does not."""
    if request.param == "absent":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    elif request.param == "unsupported":
        monkeypatch.setattr(renaming, "_renameat2", lambda: lambda *_arguments: -1)
        monkeypatch.setattr(renaming.ctypes, "get_errno", lambda: errno.EINVAL)
    return request.param


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text(name)
    return path


@pytest.mark.usefixtures("system")
def test_a_new_place_is_taken(tmp_path: Path) -> None:
    rename_new(folder(tmp_path / "a", "x"), tmp_path / "b")
    assert (tmp_path / "b" / "x").read_text() == "x"
    rename_new(tmp_path / "b" / "x", tmp_path / "y")
    assert (tmp_path / "y").read_text() == "x"
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "link", "dangling link"])
@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, kind: str, source: str) -> None:
    moved = folder(tmp_path / "a", "x") if source == "folder" else folder(tmp_path / "a", "x") / "x"
    target = tmp_path / "b"
    if kind.endswith("folder"):
        folder(target, *["precious"] * (kind == "folder"))
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to(tmp_path / ("a" if kind == "link" else "absent"))
    before = target.lstat()
    with pytest.raises(FileExistsError):
        rename_new(moved, target)
    assert target.lstat().st_ino == before.st_ino
    assert (tmp_path / "a" / "x").read_text() == "x"


def test_an_exchange_leaves_both(tmp_path: Path, system: str) -> None:
    first, second = folder(tmp_path / "a", "x"), folder(tmp_path / "b", "y")
    is_done = exchange(first, second)
    assert is_done == (system == "renameat2")
    assert (first / ("y" if is_done else "x")).exists()
    assert (second / ("x" if is_done else "y")).exists()


def test_other_failures_are_raised_with_the_names(tmp_path: Path, system: str) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        rename_new(tmp_path / "absent", tmp_path / "b")
    assert not (tmp_path / "b").exists(), system
    assert str(tmp_path / "absent") in str(caught.value)
