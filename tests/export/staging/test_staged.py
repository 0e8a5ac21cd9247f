"""A destination is whole or absent; what appears there meanwhile, and what others stage, is left alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hivtp.export.staging import placing
from hivtp.export.staging.destination import Destination, check_destination
from hivtp.export.staging.folder import StagingFolder
from hivtp.export.staging.staged import staged
from hivtp_ops.errors import BundleError
from tests.support.bundles import fake_bundle, mark_of, names_in, write_fake_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = Path("/nonexistent")
CHANGED = "changed while the bundle was being written, and is left as it is; give another destination; nothing was"


def check(path: Path) -> Destination:
    return check_destination(path, True, NOTHING)


def export(path: Path, mark: str = "new", meanwhile: Callable[[], object] = lambda: None) -> None:
    with staged(check(path)) as folder:
        write_fake_bundle(folder, mark)
        meanwhile()


@pytest.fixture(params=["exchange", "move"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can exchange two folders, and one that cannot."""
    if request.param == "move":
        monkeypatch.setattr(placing, "exchange", lambda _first, _second: False)
    return request.param


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("x")


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_link(path: Path) -> None:
    path.symlink_to("/etc")


def another_bundle(path: Path) -> None:
    fake_bundle(path, "theirs")


@pytest.mark.parametrize("appear", [an_empty_folder, a_folder, a_file, a_link, another_bundle])
def test_what_appears_at_a_new_destination_is_left_alone(tmp_path: Path, appear: Callable[[Path], None]) -> None:
    path = tmp_path / "bundle"
    found = []
    with pytest.raises(BundleError, match=CHANGED):
        export(path, meanwhile=lambda: (appear(path), found.append(path.lstat())))
    assert path.lstat().st_ino == found[0].st_ino
    assert appear is not a_folder or names_in(path) == ["precious"]
    assert names_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("appear", [a_folder, a_file, another_bundle])
def test_what_takes_the_place_of_an_old_bundle_is_left_alone(
    tmp_path: Path, system: str, appear: Callable[[Path], None]
) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    found = []

    def take_its_place() -> None:
        path.rename(tmp_path / "moved")
        appear(path)
        found.append(path.lstat())

    with pytest.raises(BundleError, match=CHANGED):
        export(path, meanwhile=take_its_place)
    assert path.lstat().st_ino == found[0].st_ino
    assert mark_of(tmp_path / "moved") == "old"
    assert names_in(tmp_path) == ["bundle", "moved"], system


def test_what_is_put_into_an_old_bundle_is_left_alone(tmp_path: Path, system: str) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    with pytest.raises(BundleError, match=CHANGED):
        export(path, meanwhile=lambda: (path / "notes.txt").write_text("precious"))
    assert (path / "notes.txt").read_text() == "precious"
    (path / "notes.txt").unlink()
    assert (mark_of(path), names_in(tmp_path)) == ("old", ["bundle"]), system


def test_what_is_put_into_an_empty_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    with pytest.raises(BundleError, match=CHANGED):
        export(path, meanwhile=lambda: (path / "notes.txt").write_text("precious"))
    assert names_in(path) == ["notes.txt"]


def test_an_old_bundle_that_has_gone_is_not_missed(tmp_path: Path, system: str) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    with staged(check(path)) as folder:
        write_fake_bundle(folder, "new")
        path.rename(tmp_path / "moved")
    assert (mark_of(path), mark_of(tmp_path / "moved")) == ("new", "old")
    assert names_in(tmp_path) == ["bundle", "moved"], system


def test_a_failed_second_rename_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    monkeypatch.setattr(placing, "exchange", lambda _first, _second: False)
    rename_new = placing.rename_new

    def fail_once(source: Path, _target: Path) -> None:
        monkeypatch.setattr(placing, "rename_new", rename_new)
        raise OSError(errno.EIO, "Input/output error", str(source))

    monkeypatch.setattr(placing, "rename_new", fail_once)
    with pytest.raises(BundleError, match=r"cannot write .*: Input/output error; .*; nothing was written"):
        export(path)
    assert (mark_of(path), names_in(tmp_path)) == ("old", ["bundle"])


def test_where_even_that_fails_both_bundles_are_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    monkeypatch.setattr(placing, "exchange", lambda _first, _second: False)

    def fail(source: Path, _target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(source))

    with monkeypatch.context() as patched:
        patched.setattr(placing, "rename_new", fail)
        with pytest.raises(BundleError, match=r"the old bundle is now (.*)/replaced, the new one .*/bundle: move"):
            export(path)
    [left] = names_in(tmp_path)
    assert mark_of(tmp_path / left / "replaced") == "old"
    # The next export finds a whole bundle, and puts it in place.
    check(path)
    assert (mark_of(path), names_in(tmp_path)) == ("new", ["bundle"])


def test_everything_is_synced_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_bundle(tmp_path / "bundle", "old")
    events: list[str] = []
    sync, exchange = os.fsync, placing.exchange
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(placing, "exchange", lambda *paths: events.append("exchange") or exchange(*paths))
    export(path)
    place = events.index("exchange")
    staging = Path(next(event for event in events if event.endswith("/manifest.json"))).parent
    in_bundle = {str(staging / file.relative_to(path)) for file in path.rglob("*")} | {str(staging)}
    assert in_bundle <= set(events[:place])
    # And the rename itself, before the old bundle is deleted.
    assert {str(tmp_path), str(staging.parent)} <= set(events[place + 1 :])


def test_errors_of_writing_and_of_reading_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "bundle"

    def fail(error: OSError) -> str:
        with pytest.raises(BundleError) as caught, staged(check(path)):
            raise error
        assert names_in(tmp_path) == []
        return str(caught.value)

    full = "the disk is full, or a limit is reached; free some space or give another place; nothing was written"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert fail(OSError(number, "...")) == f"cannot write {path}: {full}"
    assert fail(OSError("100 requested and 3 written")) == f"cannot write {path}: {full}"
    assert fail(OSError(errno.ENOSPC, "...", "/tmp/cache")) == f"cannot write /tmp/cache: {full}"
    assert fail(OSError(errno.EIO, "Input/output error", "/models/a.safetensors")) == (
        "cannot use /models/a.safetensors: Input/output error; nothing was written"
    )
    assert fail(OSError(errno.EIO, "Input/output error")) == (
        "the export failed: Input/output error; nothing was written"
    )
    with pytest.raises(BundleError, match=rf"cannot write {path}: Is a directory"), staged(check(path)) as folder:
        folder.write_text("x")


def test_an_interrupt_says_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt, match="nothing was written"), staged(check(path)):
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    sync = placing._sync
    monkeypatch.setattr(placing, "_sync", lambda place: interrupt() if place == tmp_path else sync(place))
    with pytest.raises(KeyboardInterrupt, match="the bundle is whole"):
        export(path)
    assert (mark_of(path), names_in(tmp_path)) == ("new", ["bundle"])


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^theirs$"), staged(check(tmp_path / "bundle")):
        raise RuntimeError("theirs")
    assert names_in(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from hivtp.export.staging.destination import check_destination
from hivtp.export.staging.staged import staged
with staged(check_destination(Path(sys.argv[1]), True, Path("/nonexistent"))) as folder:
    (folder / "file").write_text("theirs")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("is_empty_folder", [False, True])
def test_a_living_export_is_left_alone_and_a_dead_one_is_cleaned_up(tmp_path: Path, is_empty_folder: bool) -> None:
    path = tmp_path / "bundle"
    if is_empty_folder:
        path.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        theirs = Path(other.stdout.readline().strip())
        assert theirs.is_relative_to(path if is_empty_folder else tmp_path)
        export(tmp_path / "elsewhere")
        check(path)
        assert (theirs / "file").read_text() == "theirs"
    finally:
        other.kill()
        other.wait()
    # For another destination it is not ours to clean up.
    export(tmp_path / "elsewhere")
    assert theirs.exists()
    export(path)
    assert not theirs.parent.exists()
    assert mark_of(path) == "new"
    assert names_in(tmp_path) == ["bundle", "elsewhere"]


def test_a_staging_folder_of_another_machine_or_time_is_left_alone_and_named(tmp_path: Path) -> None:
    """Locks may not reach from one machine to another, so that a free one says nothing."""
    path = tmp_path / "bundle"
    left = StagingFolder(tmp_path, path)
    (left.bundle / "file").write_text("theirs")
    left.release()
    owner = json.loads((left.path / "owner.json").read_text())
    (left.path / "owner.json").write_text(json.dumps(owner | {"boot": "another"}))
    with pytest.warns(UserWarning, match=rf"{left.path} was left by an export .* delete it if none is running"):
        export(path)
    assert (left.bundle / "file").read_text() == "theirs"
    assert mark_of(path) == "new"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"destination": "bundle"}', b"[" * 60_000])
def test_a_folder_without_a_proper_owner_is_left_alone(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / ".hivtp-partial-theirs"
    folder.mkdir()
    (folder / "owner.json").write_bytes(content)
    (folder / "bundle").mkdir()
    is_said = pytest.warns(UserWarning, match="was left by an export that did not end")
    with is_said if b"destination" in content else contextlib.nullcontext():
        export(tmp_path / "bundle")
    assert names_in(folder) == ["bundle", "owner.json"]


def test_links_and_pipes_that_look_like_staging_folders_are_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / ".hivtp-partial-link").symlink_to(precious)
    (tmp_path / ".hivtp-partial-file").write_text("x")
    (tmp_path / ".hivtp-partial-pipe").mkdir()
    os.mkfifo(tmp_path / ".hivtp-partial-pipe" / "owner.json")
    before = names_in(tmp_path)
    export(tmp_path / "bundle")
    assert names_in(tmp_path) == sorted([*before, "bundle"])


def test_without_locks_an_export_works_and_cleans_up_after_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = StagingFolder(tmp_path, tmp_path / "bundle")
    export(tmp_path / "bundle")
    assert names_in(tmp_path) == sorted([left.path.name, "bundle"])
    left.remove()
    assert names_in(tmp_path) == ["bundle"]


def test_a_foreign_folder_that_was_exchanged_when_an_export_was_killed_is_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    fake_bundle(path, "new")
    left = StagingFolder(tmp_path, path)
    left.complete.touch()
    (left.bundle / "precious").write_text("x")
    left.release()
    with pytest.warns(UserWarning, match="was left as it is: move it, or delete it"):
        check(path)
    assert (left.bundle / "precious").read_text() == "x"
