"""How a whole bundle gets to its place, and never takes the place of what is not known."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from hivtp.export.staging.contents import is_empty, is_replaceable
from hivtp.export.staging.renaming import exchange, rename_new
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.staging.destination import Destination
    from hivtp.export.staging.folder import StagingFolder


def put_in_place(staging: StagingFolder, destination: Destination) -> None:
    """Sync a bundle to the disk and move it to its destination.

    Raises:
        BundleError: what stands at the destination is not what stood there at first; it is untouched.
        OSError: the bundle cannot be synced or moved.
    """
    path = destination.path
    if destination.is_empty_folder and not is_empty(path):
        raise _changed(path)
    _sync_all(staging.bundle)
    staging.complete.touch()
    _sync(staging.path)
    try:
        if destination.is_empty_folder:
            _fill(staging, path)
        elif destination.old is None or identity(path) is None:
            rename_new(staging.bundle, path)
        else:
            _replace(staging, path, destination.old)
    except FileExistsError as error:
        raise _changed(path) from error
    _sync(path.parent)


def identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of what stands at a path; None where nothing does."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _fill(staging: StagingFolder, folder: Path) -> None:
    """Move the bundle's contents into an empty folder, which may be a mount point; the manifest makes it a bundle."""
    moved: list[Path] = []
    try:
        for entry in staging.contents():
            rename_new(entry, folder / entry.name)
            moved.append(folder / entry.name)
    except BaseException:
        for entry in moved:
            entry.rename(staging.bundle / entry.name)
        staging.complete.unlink()
        raise
    _sync(folder)


def _replace(staging: StagingFolder, path: Path, old: tuple[int, int]) -> None:
    """Put the new bundle in the place of the old one, if that is still what stands there, as it was."""
    _check_old(path, old, path)
    if exchange(staging.bundle, path):
        try:
            _check_old(staging.bundle, old, path)
        except BundleError:
            exchange(staging.bundle, path)
            raise
        # The old one is deleted next, which must not reach the disk before the exchange.
        _sync(staging.path)
        return
    path.rename(staging.replaced)
    try:
        _check_old(staging.replaced, old, path)
        rename_new(staging.bundle, path)
    except BaseException:
        rename_new(staging.replaced, path)
        raise


def _check_old(folder: Path, old: tuple[int, int], path: Path) -> None:
    if identity(folder) != old or not is_replaceable(folder):
        raise _changed(path)


def _changed(path: Path) -> BundleError:
    return BundleError(
        f"what stands at {path} changed while the bundle was being written, and is left as it is; give another "
        "destination"
    )


def _sync_all(folder: Path) -> None:
    """Have every file and folder on the disk, so that a rename never outlives what it renamed."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in names), root):
            _sync(path)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not sync folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
