"""A repository of the Hugging Face hub, by its id; a path that exists always comes before an id."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.runtime.hub.explain import explained, network_errors
from hivtp_ops.errors import HubError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# owner/name, as the hub allows them.
_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$", re.ASCII)
SECONDS_TO_ANSWER = 10.0
MAIN = "main"
# One of these makes a repository a checkpoint or a bundle.
FIRST_FILES = ("config.json", "manifest.json")


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: its id.
        revision: the commit.
        branch: the branch, tag or commit that was asked for.
        files: names of its files; offline, of those that are in the cache.
        cached: the folder in the cache, where the hub cannot be reached; None where it can.
    """

    name: str
    revision: str
    branch: str
    files: tuple[str, ...]
    cached: Path | None

    def download(self, names: Iterable[str], *, is_quiet: bool = False) -> Path:
        """Bring files into the cache, as far as they are not there yet, and return the folder that holds them.

        Args:
            names: of files of this repository.
            is_quiet: show no progress bars.

        Raises:
            HubError: they cannot be downloaded or written, and what to do.
        """
        names = list(names)
        folder = self.cached or self._folder_of(names)
        if folder is not None:
            return folder
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for name in names]
        with explained(self.name, self.revision), _progress_bars(is_quiet=is_quiet):
            # By the branch, so that the cache knows it and finds the commit where there is no network.
            folder = Path(snapshot_download(self.name, revision=self.branch, allow_patterns=patterns))
            if folder.name != self.revision:
                folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))
        return folder

    def _folder_of(self, names: Sequence[str]) -> Path | None:
        """The folder in the cache, if it holds all these files; they never change in one commit."""
        from huggingface_hub import try_to_load_from_cache

        files = {name: try_to_load_from_cache(self.name, name, revision=self.revision) for name in names}
        folder = None
        for name, file in files.items():
            if not isinstance(file, str):
                return None
            folder = Path(file).parents[name.count("/")]
        return folder


def find_repository(name: str | Path, revision: str | None = None) -> Repository | None:
    """The repository of a name, or None where the name is a path: where it exists, or cannot be an id.

    Args:
        name: of a folder, or owner/name.
        revision: a branch, tag or commit; None for the main branch.

    Raises:
        HubError: there is no such repository or revision, it needs a login, the hub cannot be reached and the cache
            does not have it, or huggingface_hub is not installed.
    """
    text = str(name)
    if not is_id(text):
        if revision is not None:
            raise HubError(f"a revision is one of a repository on the hub, and {text} is a path; leave --revision out")
        return None
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(
            f"there is no folder {text}; to take it as the id of a repository on the Hugging Face hub, install "
            "huggingface_hub with: pip install 'hivtp[hub]'"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with explained(text, revision):
        try:
            found = HfApi().model_info(text, revision=revision, timeout=SECONDS_TO_ANSWER)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except network_errors() as error:
            with contextlib.suppress(LocalEntryNotFoundError):
                return _in_cache(text, revision)
            raise error from None
        files = tuple(item.rfilename for item in found.siblings or ())
    return Repository(text, str(found.sha), revision or MAIN, files, None)


def is_id(name: str | Path) -> bool:
    """Whether a name is looked up on the hub: it has the form of an id, and no path of that name exists."""
    return _ID.match(str(name)) is not None and not os.path.lexists(name)


def _in_cache(name: str, revision: str | None) -> Repository:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(FIRST_FILES)))
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return Repository(name, folder.name, revision or MAIN, tuple(sorted(files)), folder)


@contextlib.contextmanager
def _progress_bars(*, is_quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not is_quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
