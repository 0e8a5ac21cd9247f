"""A folder to write a bundle in, that becomes the destination when all went well, and vanishes otherwise."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.engines.bundle import MANIFEST_NAME
from hivtp.export.staging.destination import LONGEST_NAME
from hivtp.export.staging.folder import StagingFolder
from hivtp.export.staging.placing import identity, put_in_place
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.export.staging.destination import Destination

# What an exhausted disk, quota or file-size limit looks like; numpy's own message comes without a number.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMPY_SHORT_WRITE = "requested and"


@contextlib.contextmanager
def staged(destination: Destination) -> Iterator[Path]:
    """Give a new folder that becomes the destination when the block ends well, and vanishes otherwise.

    Nothing that this process did not make is deleted, except the old bundle that `destination` names, once the new one
    stands in its place.

    Args:
        destination: from `check_destination`.

    Raises:
        BundleError: the folder cannot be made or written, or something appeared at the destination meanwhile.
        KeyboardInterrupt: the block was interrupted; the message says what that leaves.
    """
    parents: list[Path] = []
    staging = None
    manifest: tuple[int, int] | None = None
    is_written = False
    try:
        _make_parents(destination.path.parent, parents)
        place = destination.path if destination.is_empty_folder else destination.path.parent
        staging = StagingFolder(place, destination.path)
        _probe(staging.bundle)
        yield staging.bundle
        is_written = True
        manifest = identity(staging.bundle / MANIFEST_NAME)
        put_in_place(staging, destination)
    except BaseException as error:
        is_in_place = manifest is not None and identity(destination.path / MANIFEST_NAME) == manifest
        reason = _reason(error, destination, staging) if isinstance(error, OSError) else str(error)
        left = _clean_up(staging, parents, destination, is_in_place=is_in_place)
        if isinstance(error, OSError) or (is_written and isinstance(error, BundleError)):
            raise BundleError(f"{reason}; {left}") from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(left) from error
        raise
    try:
        is_clean = staging.remove()
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("the bundle is whole") from stopped
    if not is_clean:
        warnings.warn(f"the bundle is whole, but {staging.path} could not be deleted; delete it", stacklevel=3)


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; `made` gets those that were not there, the innermost first."""
    for missing in [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]:
        with contextlib.suppress(FileExistsError):
            missing.mkdir()
            made.insert(0, missing)


def _probe(folder: Path) -> None:
    file = folder / LONGEST_NAME
    file.write_bytes(b"x")
    file.unlink()


def _reason(error: OSError, destination: Destination, staging: StagingFolder | None) -> str:
    """What failed: writing the bundle, or something else."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    ours = destination.path.parent if staging is None else staging.path
    is_ours = any(Path(name).is_relative_to(ours) or Path(name) == destination.path for name in names)
    if error.errno in _NO_SPACE or (error.errno is None and _NUMPY_SHORT_WRITE in str(error)):
        place = destination.path if is_ours or not names else names[0]
        return f"cannot write {place}: the disk is full, or a limit is reached; free some space or give another place"
    reason = error.strerror or str(error)
    if is_ours or staging is None:
        return f"cannot write {destination.path}: {reason}; give another destination"
    return f"cannot use {names[0]}: {reason}" if names else f"the export failed: {reason}"


def _clean_up(
    staging: StagingFolder | None, parents: list[Path], destination: Destination, *, is_in_place: bool
) -> str:
    """Delete what this process made, and say what that leaves."""
    if staging is not None and not is_in_place:
        if staging.replaced.exists():
            staging.release()
            return f"the old bundle is now {staging.replaced}, the new one {staging.bundle}: move one of them there"
        if destination.is_empty_folder and staging.complete.exists():
            staging.release()
            return f"a part of the bundle is in place, the rest in {staging.bundle}: move it there"
    is_clean = staging is None or staging.remove()
    if is_in_place:
        return "the bundle is whole"
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()
    if staging is None or is_clean:
        return "nothing was written"
    return f"{staging.path} could not be deleted: delete it"
