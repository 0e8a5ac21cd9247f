"""Folders of the Hugging Face hub's cache that are given as paths."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from hivtp_ops.errors import HubError

# How the cache calls the folder of a repository.
_FOLDER = re.compile(r"^models--([^/]+?)--(.+)$")


def snapshot_of(folder: str | Path) -> Path:
    """The files of a repository where a folder of the hub's cache, models--owner--name, was given; else the folder.

    Raises:
        HubError: the cache holds several commits, and none is the main branch's.
    """
    folder = Path(folder)
    if not _FOLDER.match(folder.name) or not os.path.isdir(folder / "snapshots"):
        return folder
    snapshots = sorted(item for item in (folder / "snapshots").iterdir() if item.is_dir())
    with contextlib.suppress(OSError, UnicodeDecodeError):
        main = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if main in snapshots:
            return main
    if len(snapshots) == 1:
        return snapshots[0]
    raise HubError(
        f"{folder} holds {len(snapshots)} snapshots and no main branch; give one of them, as in {folder}/snapshots/..."
    )


def id_of(folder: Path) -> tuple[str, str] | None:
    """The repository's id and the commit of a snapshot in the hub's cache; None for any other folder."""
    folder = Path(os.path.abspath(folder))
    match = _FOLDER.match(folder.parent.parent.name)
    if match is None or folder.parent.name != "snapshots":
        return None
    return f"{match[1]}/{match[2]}", folder.name
