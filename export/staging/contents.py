"""What a folder holds: nothing, a bundle of ours and nothing else, or somebody's data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hivtp.engines.bundle import MANIFEST_NAME, MAX_MANIFEST_BYTES, PLANS_FOLDER
from hivtp.engines.files import parse_json, read_regular
from hivtp.export.staging.folder import STAGING_PREFIX

# A volume that was just mounted may hold this folder and nothing else.
_OF_THE_FILE_SYSTEM = "lost+found"


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what the file system or this export put there."""
    return all(name == _OF_THE_FILE_SYSTEM or name.startswith(STAGING_PREFIX) for name in os.listdir(folder))


def is_replaceable(folder: Path) -> bool:
    """Whether a folder holds a bundle of this project, of any version, whole or damaged, and nothing else."""
    listed = listed_files(folder)
    return listed is not None and other_file(folder, listed) is None


def listed_files(folder: Path) -> set[str] | None:
    """The files of a bundle by its manifest, of whatever version; None where that is not a manifest of ours."""
    try:
        manifest = parse_json(read_regular(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, Mapping) or not isinstance(manifest.get("schema_version"), int):
        return None
    files, versions = manifest.get("files"), manifest.get("versions")
    if not isinstance(files, Mapping) or not isinstance(versions, Mapping) or "hivtp" not in versions:
        return None
    return {MANIFEST_NAME, *files}


def other_file(folder: Path, listed: set[str]) -> str | None:
    """A file that neither the manifest lists nor `hivtp plan` wrote."""
    for root, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            place = (Path(root) / name).relative_to(folder).as_posix()
            if place not in listed and not place.startswith(f"{PLANS_FOLDER}/"):
                return place
    return None


def _raise(error: OSError) -> None:
    raise error
