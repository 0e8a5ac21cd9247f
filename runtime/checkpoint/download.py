"""Weights of a checkpoint on the Hugging Face hub: the files that hold them, and none in other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.checkpoint.weight_files import entry_file, shard_names
from hivtp.runtime.hub.cache import snapshot_of
from hivtp.runtime.hub.repository import find_repository, is_id
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.runtime.hub.repository import Repository

CONFIG_FILE = "config.json"


def checkpoint_folder(name: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint's config and weights, downloaded where it is named by its id on the hub.

    Args:
        name: of a folder, or owner/name.
        revision: a branch, tag or commit, of one on the hub.

    Raises:
        CheckpointError: the repository holds no checkpoint.
        HubError: it cannot be downloaded, and what to do.
    """
    repository = find_repository(name, revision if is_id(name) else None)
    if repository is None:
        return snapshot_of(name)
    if CONFIG_FILE not in repository.files:
        raise CheckpointError(
            f"the repository {repository.name} of the hub has no {CONFIG_FILE}; it is not a checkpoint"
        )
    repository.download([CONFIG_FILE])
    return download_weights(repository)


def download_weights(repository: Repository, *, is_quiet: bool = False) -> Path:
    """Download the weights of a repository, and return the folder that holds them.

    Raises:
        CheckpointError: it has none, or several.
        HubError: they cannot be downloaded, and what to do.
    """
    entry = entry_file(repository.files)
    if entry is None:
        raise CheckpointError(f"the repository {repository.name} of the hub holds no safetensors weights")
    folder = repository.download([entry], is_quiet=is_quiet)
    if entry.endswith(".json"):
        repository.download(shard_names(folder / entry), is_quiet=is_quiet)
    return folder
