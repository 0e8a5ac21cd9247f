"""Which plans this machine built, recorded outside bundles: a plan is code, and a bundle may be a stranger's."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def trust_folder() -> Path:
    """`hivtp/plans` in the user's state folder; it holds an empty file for each plan, named by its sha256.

    Raises:
        OSError: the user has no home folder.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    # A relative path would mean whatever folder the process runs in, perhaps a bundle. The standard says to ignore it.
    if os.path.isabs(base):
        return Path(base) / "hivtp" / "plans"
    try:
        return Path.home() / ".local" / "state" / "hivtp" / "plans"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def remember_plan(sha256: str) -> None:
    """Record a plan as one that this machine built.

    Raises:
        OSError: the record cannot be written.
    """
    folder = trust_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / sha256).touch(mode=0o600)


def is_own_plan(sha256: str) -> bool:
    """Whether this machine built the plan, by a record that this user wrote."""
    if _SHA256.fullmatch(sha256) is None:
        return False
    try:
        found = (trust_folder() / sha256).lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
