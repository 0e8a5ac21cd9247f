"""Bundles of the Hugging Face hub: the manifest first, then what it lists and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.engines.bundle import MANIFEST_NAME, MAX_MANIFEST_BYTES
from hivtp.engines.files import read_regular
from hivtp.engines.manifest_reader import read_manifest
from hivtp.runtime.hub.cache import snapshot_of
from hivtp.runtime.hub.repository import find_repository
from hivtp_ops.errors import BundleError, HubError

if TYPE_CHECKING:
    from pathlib import Path


def bundle_folder(bundle: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundle, downloaded where it is named by its id on the hub.

    Args:
        bundle: a folder, or owner/name.
        revision: a branch, tag or commit, of a bundle on the hub.

    Raises:
        BundleError: what is on the hub is not a bundle.
        HubError: it cannot be downloaded, and what to do.
    """
    repository = find_repository(bundle, revision)
    if repository is None:
        return snapshot_of(bundle)
    if MANIFEST_NAME not in repository.files:
        raise BundleError(
            f"there is no folder {bundle}, and the repository {repository.name} of the hub has no {MANIFEST_NAME}, so "
            "it is not a bundle; a checkpoint becomes one with hivtp export"
        )
    file = repository.download([MANIFEST_NAME]) / MANIFEST_NAME
    try:
        manifest = read_manifest(read_regular(file, MAX_MANIFEST_BYTES))
    except (BundleError, OSError) as error:
        raise BundleError(f"cannot open the bundle {repository.name} of the hub: {error}") from error
    missing = sorted(set(manifest.files) - set(repository.files))
    if missing:
        place = "the cache" if repository.cached else "the hub"
        raise HubError(f"the bundle {repository.name} is not whole in {place}: it lacks {', '.join(missing)}")
    return repository.download([MANIFEST_NAME, *manifest.files])
