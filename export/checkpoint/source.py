"""Where a checkpoint comes from: a folder, or the Hugging Face hub, of which only what is needed is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import CONFIG_FILE, GENERATION_FILE, SUPPORTED, read_config, read_object
from hivtp.export.checkpoint.foreign import refuse_formats, refuse_kind
from hivtp.export.checkpoint.original import JSON_FILES, OTHER_FILES
from hivtp.runtime.checkpoint.download import download_weights
from hivtp.runtime.checkpoint.original_layout import is_original
from hivtp.runtime.hub.cache import id_of, snapshot_of
from hivtp.runtime.hub.repository import find_repository
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.runtime.hub.repository import Repository


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that was named.

    Attributes:
        name: of its folder, or its id on the hub.
        revision: the commit on the hub; None for a folder.
        folder: where it lies.
    """

    name: str
    revision: str | None
    folder: Path

    @classmethod
    def of_folder(cls, folder: str | Path) -> CheckpointSource:
        """A folder; in the hub's cache it has the name and commit of its repository.

        Raises:
            CheckpointError: there is no such folder.
            HubError: a folder of the cache holds several commits, and none is the main branch's.
        """
        # Also where no folder can have the name: too long, or with a zero byte.
        if not os.path.isdir(folder):
            raise CheckpointError(f"{str(folder)[:200]!r} is not a folder; give the folder of a {SUPPORTED} checkpoint")
        folder = snapshot_of(folder)
        found = id_of(folder)
        if found is not None:
            return cls(*found, folder)
        return cls(folder.resolve().name, None, folder)


def find_checkpoint(
    name: str | Path,
    revision: str | None = None,
    vision_config: Mapping[str, Any] | None = None,
    *,
    is_quiet: bool = False,
) -> CheckpointSource:
    """The checkpoint of a name: a folder that exists, or else a repository on the hub, which is downloaded.

    Args:
        name: of a folder, or owner/name.
        revision: a branch, tag or commit, of a repository on the hub.
        vision_config: see `read_config`.
        is_quiet: show no progress bars.

    Raises:
        CheckpointError: the repository is not a checkpoint that can be exported.
        HubError: it cannot be downloaded, and what to do.
    """
    repository = find_repository(name, revision)
    if repository is None:
        return CheckpointSource.of_folder(name)
    return _download(repository, vision_config, is_quiet=is_quiet)


def _download(repository: Repository, vision_config: Mapping[str, Any] | None, *, is_quiet: bool) -> CheckpointSource:
    """Download what an export reads, the small files first: what cannot be exported is refused before the weights."""
    names = repository.files
    refuse_kind(repository.name, names)
    if CONFIG_FILE not in names:
        raise CheckpointError(
            f"the repository {repository.name} of the hub has no {CONFIG_FILE}; it is not a checkpoint"
        )
    forms = (CONFIG_FILE, GENERATION_FILE, *JSON_FILES, *OTHER_FILES)
    needed = [name for name in names if any(fnmatchcase(name, form) for form in forms)]
    folder = repository.download(needed, is_quiet=is_quiet)
    read_config(folder, vision_config)
    refuse_formats(repository.name, names, is_original=is_original(read_object(folder / CONFIG_FILE)))
    return CheckpointSource(repository.name, repository.revision, download_weights(repository, is_quiet=is_quiet))
