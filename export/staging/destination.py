"""Where a bundle will lie: what may stand there already is decided before any work is done."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hivtp.export.staging.contents import is_empty, listed_files, other_file
from hivtp.export.staging.leftovers import finish_leftovers
from hivtp_ops.errors import BundleError

# As long as any path in a bundle.
LONGEST_NAME = "x" * 64


@dataclass(frozen=True)
class Destination:
    """A destination that can be written, as far as can be told beforehand.

    Attributes:
        path: absolute, with links resolved.
        is_empty_folder: a folder stands there that holds nothing: it stays, and takes the contents.
        old: the device and inode of the bundle that stands there and may be replaced; None where there is none.
    """

    path: Path
    is_empty_folder: bool = False
    old: tuple[int, int] | None = None


def check_destination(destination: Path, overwrite: bool, checkpoint: Path) -> Destination:
    """Refuse a destination that could not be written, and finish what a killed export left there.

    Args:
        destination: as the user names it.
        overwrite: one of our bundles may be replaced.
        checkpoint: what is exported; nothing is written into its folder.

    Raises:
        BundleError: something stands there that is not ours to replace, or the name cannot be used.
    """
    try:
        path = _resolved(destination)
        if os.path.isdir(checkpoint) and path.is_relative_to(os.path.realpath(checkpoint)):
            raise BundleError(f"{destination} lies in the checkpoint {checkpoint}; give a destination outside of it")
        if os.path.lexists(path) and not path.is_dir():
            raise BundleError(f"{destination} exists and is not a folder; give another destination")
        with contextlib.suppress(FileNotFoundError):
            # A path may be short enough by itself, and too long with what comes into it.
            (path / LONGEST_NAME).lstat()
        finish_leftovers(path)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return Destination(path)
        if is_empty(path):
            return Destination(path, is_empty_folder=True)
        _check_bundle(destination, path, overwrite)
        return Destination(path, old=(found.st_dev, found.st_ino))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BundleError(f"cannot write {destination!s:.200}: {reason}; give another destination") from error


def _resolved(destination: Path) -> Path:
    name = str(destination)
    if "\0" in name:
        raise ValueError("its name holds a NUL character")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError("its name is not UTF-8, which onnxruntime cannot open") from error
    if destination.is_symlink() and not destination.exists():
        raise BundleError(
            f"{destination} is a link to {os.readlink(destination)}, where nothing stands; delete the link, or give "
            "another destination"
        )
    return Path(os.path.realpath(destination))


def _check_bundle(destination: Path, path: Path, overwrite: bool) -> None:
    """Refuse what is not a bundle of ours, whole, and ours to replace."""
    listed = listed_files(path)
    if listed is None:
        raise BundleError(f"{destination} exists and is not a bundle of hivtp; give another destination")
    if not overwrite:
        raise BundleError(f"{destination} exists; give another destination, or --overwrite to replace it")
    other = other_file(path, listed)
    if other is not None:
        raise BundleError(
            f"{destination} holds {other}, which is not part of the bundle, and overwriting would delete it; move "
            "it away, or give another destination"
        )
    if path in _mount_points() or os.path.ismount(path):
        raise BundleError(
            f"{destination} is a mount point, so the bundle in it cannot be replaced in one step; give a folder inside "
            "it, or empty it first"
        )


def _mount_points() -> set[Path]:
    """What Linux has mounted, binds within one file system included, which cannot be told by their device."""
    if not sys.platform.startswith("linux"):
        return set()
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    # The kernel writes a space in a name as \040.
    return {Path(line.split()[4].replace(r"\040", " ")) for line in lines}
