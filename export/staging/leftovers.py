"""What exports left that were killed: a bundle that was whole is put in place, the rest deleted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from hivtp.export.staging.contents import is_replaceable
from hivtp.export.staging.folder import INSIDE, STAGING_PREFIX, StagingFolder
from hivtp.export.staging.renaming import rename_new


def finish_leftovers(destination: Path) -> None:
    """Finish what killed exports to a destination left: a bundle that was whole is put in place, the rest deleted.

    Raises:
        OSError: a bundle that was whole cannot be put in place.
    """
    for parent, name in ((destination.parent, destination.name), (destination, INSIDE)):
        for path in _staging_folders(parent):
            folder = StagingFolder.of_dead(path, name)
            if folder is not None and _is_finished(folder, destination, is_inside=name == INSIDE):
                folder.remove()
            elif folder is not None:
                folder.release()
                warnings.warn(
                    f"an export to {destination} was killed while it put its bundle in place, where something else "
                    f"stood; what {path} holds was left as it is: move it, or delete it",
                    stacklevel=2,
                )


def _staging_folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            folders = [entry for entry in entries if entry.name.startswith(STAGING_PREFIX)]
            return [Path(entry.path) for entry in folders if entry.is_dir(follow_symlinks=False)]
    except OSError:
        # What cannot be read cannot be written either, and the export says so.
        return []


def _is_finished(folder: StagingFolder, destination: Path, *, is_inside: bool) -> bool:
    """Finish the last step of a killed export; False where something stands in the way, or would be lost."""
    try:
        if is_inside and folder.complete.exists():
            for entry in folder.contents():
                rename_new(entry, destination / entry.name)
        elif folder.replaced.exists() and folder.bundle.exists():
            # It was killed after it had moved the old bundle away, and before it moved the new one in.
            rename_new(folder.bundle, destination)
        elif folder.complete.exists() and folder.bundle.exists():
            # Either the new bundle or what stood at the destination, for which it was exchanged.
            return is_replaceable(folder.bundle)
    except FileExistsError:
        return False
    return True
