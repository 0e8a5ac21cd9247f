"""What may stand at a destination is decided before any work, and nobody's data is ever taken for a bundle."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.staging import destination as destinations
from hivtp.export.staging.destination import check_destination
from hivtp.export.staging.staged import staged
from hivtp_ops.errors import BundleError
from tests.support.bundles import fake_bundle, mark_of, names_in, write_fake_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def check(path: Path, *, overwrite: bool = True, checkpoint: str = "/nonexistent") -> destinations.Destination:
    from pathlib import Path as Folder

    return check_destination(Folder(path), overwrite, Folder(checkpoint))


def export(path: Path, mark: str = "new", *, overwrite: bool = True) -> None:
    with staged(check(path, overwrite=overwrite)) as folder:
        write_fake_bundle(folder, mark)


def web_app(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"name": "app", "icons": []}))


def checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 6, "files": {}}))


def damaged(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema_version": 6, "files": ')


def nested(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


def photos(folder: Path) -> None:
    (folder / "one.jpg").write_text("precious")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "manifest.json")


@pytest.mark.parametrize("fill", [web_app, checkpoint, damaged, nested, photos, pipe])
def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    fill(folder)
    before = names_in(folder)
    with pytest.raises(BundleError, match="exists and is not a bundle of hivtp; give another destination"):
        check(folder)
    assert names_in(folder) == before
    assert names_in(tmp_path) == ["data"]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("precious")
    with pytest.raises(BundleError, match="exists and is not a folder"):
        check(tmp_path / "bundle")
    assert (tmp_path / "bundle").read_text() == "precious"


def test_a_bundle_is_replaced_only_when_asked_and_only_if_nothing_else_is_in_it(tmp_path: Path) -> None:
    folder = fake_bundle(tmp_path / "bundle", "old")
    with pytest.raises(BundleError, match="exists; give another destination, or --overwrite to replace it"):
        check(folder, overwrite=False)
    (folder / "language" / "notes.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"holds language/notes\.txt, which is not part of the bundle"):
        check(folder)
    (folder / "language" / "notes.txt").unlink()
    # Plans lie in a bundle without being listed.
    (folder / "vision" / "plans").mkdir()
    (folder / "vision" / "plans" / "h200.plan").write_text("built here")
    export(folder)
    assert mark_of(folder) == "new"
    assert names_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("change", ["old schema", "file missing", "file truncated"])
def test_an_old_or_damaged_bundle_is_still_a_bundle(tmp_path: Path, change: str) -> None:
    folder = fake_bundle(tmp_path / "bundle", "old")
    if change == "old schema":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1, "gone": 1}))
    elif change == "file missing":
        (folder / "language" / "decoder.onnx").unlink()
    else:
        (folder / "language" / "decoder.onnx").write_text("x")
    export(folder)
    assert mark_of(folder) == "new"


def test_links_are_followed_where_they_lead_and_refused_where_they_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"is a link to .*absent, where nothing stands; delete the link"):
        check(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BundleError, match="where nothing stands"):
        check(tmp_path / "loop")
    target = fake_bundle(tmp_path / "disk" / "bundle", "old")
    (tmp_path / "link").symlink_to(target)
    export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (mark_of(target), mark_of(tmp_path / "link")) == ("new", "new")
    (tmp_path / "disk" / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to(tmp_path / "disk" / "empty")
    export(tmp_path / "to_empty", overwrite=False)
    assert mark_of(tmp_path / "disk" / "empty") == "new"
    assert names_in(tmp_path / "disk") == ["bundle", "empty"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "File name too long"),
        ("a\0b", "NUL"),
        ("b\udcff", "not UTF-8"),
        ("/".join(["long" * 20] * 60), "File name too long"),
    ],
)
def test_names_that_cannot_be_used_are_refused_in_words(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(BundleError, match=message), staged(check(tmp_path / name)):
        raise AssertionError("the work began")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["b[1]", "*", "b?", "ünï cödé", "-b", "b\n", "x" * 255, "\u202etxt"])
def test_any_other_name_works(tmp_path: Path, name: str) -> None:
    export(tmp_path / name, "old")
    export(tmp_path / name)
    assert mark_of(tmp_path / name) == "new"
    assert names_in(tmp_path) == [name]


def test_a_path_that_is_only_just_too_long_for_what_is_in_it_is_refused_before_the_work(tmp_path: Path) -> None:
    # 4096 bytes is the limit of Linux; the destination alone is within it.
    folder = tmp_path
    while len(str(folder)) < 4050:
        folder /= "d" * min(200, 4050 - len(str(folder)))
    with pytest.raises(BundleError, match="File name too long"), staged(check(folder)):
        raise AssertionError("the work began")
    assert names_in(tmp_path) == []


def test_nothing_is_written_into_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = names_in(tiny_checkpoint)
    link = tmp_path / "link"
    link.symlink_to(tiny_checkpoint)
    for destination in (tiny_checkpoint, tiny_checkpoint / "bundle", link / "a" / "bundle"):
        with pytest.raises(BundleError, match=r"lies in the checkpoint .*; give a destination outside of it"):
            export_bundle(tiny_checkpoint, destination, ExportSettings(), is_quiet=True)
    assert names_in(tiny_checkpoint) == before


def test_a_mount_point_takes_a_bundle_only_while_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "mounted here"
    mounted.mkdir()
    monkeypatch.setattr(destinations, "_mount_points", lambda: {mounted})
    # A new file system brings a folder of its own.
    (mounted / "lost+found").mkdir()
    export(mounted, overwrite=False)
    (mounted / "lost+found").rmdir()
    assert mark_of(mounted) == "new"
    with pytest.raises(BundleError, match="is a mount point, so the bundle in it cannot be replaced in one step"):
        check(mounted)
    assert mark_of(mounted) == "new"


def mount_or_skip(*arguments: str) -> None:
    found = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if found.returncode != 0:
        pytest.skip("this system does not let its tests mount")


def test_a_real_mount(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted here"
    mounted.mkdir()
    mount_or_skip("-t", "tmpfs", "tmpfs", str(mounted))
    try:
        assert mounted in destinations._mount_points()
        export(mounted, overwrite=False)
        assert mark_of(mounted) == "new"
        with pytest.raises(BundleError, match="is a mount point"):
            check(mounted)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_read_only_parent_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the root user nothing is read-only, so the system's answer is played.
    def refuse(*_arguments: object, **_options: object) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".hivtp-partial-x"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    message = rf"cannot write {tmp_path}/a/bundle: Permission denied; give another destination; nothing was written"
    with pytest.raises(BundleError, match=message), staged(check(tmp_path / "a" / "bundle")):
        raise AssertionError("the work began")
    assert names_in(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"cannot write .*: Not a directory; give another destination"):
        check(tmp_path / "file" / "bundle")


def test_parents_are_made_and_taken_back_if_the_export_fails(tmp_path: Path) -> None:
    export(tmp_path / "a" / "b" / "bundle")
    assert mark_of(tmp_path / "a" / "b" / "bundle") == "new"
    with pytest.raises(RuntimeError), staged(check(tmp_path / "a" / "c" / "d" / "bundle")):
        raise RuntimeError
    assert names_in(tmp_path / "a") == ["b"]
