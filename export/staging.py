"""A destination folder that is whole or absent: written beside itself, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING

from hivtp.engines.bundle import MANIFEST_NAME
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What an exhausted disk, quota or file-size limit looks like; numpy's own message comes without a number.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMPY_SHORT_WRITE = "requested and"


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse a destination that could not be written, before any work is done.

    Raises:
        BundleError: it exists and `overwrite` is not set, or it is no bundle, or its parent cannot be made.
    """
    if destination.exists():
        is_bundle = (destination / MANIFEST_NAME).is_file()
        if not is_bundle:
            raise BundleError(f"{destination} exists and is no bundle; give another destination")
        if not overwrite:
            raise BundleError(f"{destination} exists; give another destination, or --overwrite to replace it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"cannot make the folder {destination.parent}: {error}") from error


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `destination` when the block ends well, and vanishes otherwise.

    What a killed process left behind for the same destination is removed first.

    Raises:
        BundleError: the disk is full, or the folder cannot be written.
    """
    destination = destination.absolute()
    _remove_leftovers(destination)
    folder = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        folder.mkdir()
        yield folder
        _put_in_place(folder, destination)
    except OSError as error:
        is_full = error.errno in _NO_SPACE or (error.errno is None and _NUMPY_SHORT_WRITE in str(error))
        reason = "the disk is full" if is_full else str(error)
        raise BundleError(
            f"cannot write {destination}: {reason}; free some space or give another destination. Nothing was written"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, destination: Path) -> None:
    replaced = destination.with_name(f".{destination.name}.partial-{os.getpid()}-replaced")
    if destination.exists():
        destination.rename(replaced)
    folder.rename(destination)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(destination: Path) -> None:
    prefix = f".{destination.name}.partial-"
    for leftover in destination.parent.glob(f"{prefix}*"):
        owner = leftover.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
