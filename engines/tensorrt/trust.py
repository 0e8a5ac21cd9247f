"""Which plans this machine built, recorded outside of bundles: a plan is code, and a bundle may be a stranger's."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def trust_folder() -> Path:
    """`hivtp/plans` in the user's state folder; it holds an empty file for each plan, named by its sha256."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "hivtp" / "plans"


def remember_plan(sha256: str) -> None:
    """Record a plan as one that this machine built.

    Raises:
        OSError: the record cannot be written.
    """
    folder = trust_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / sha256).touch(mode=0o600)


def is_own_plan(sha256: str) -> bool:
    """Whether this machine built the plan."""
    try:
        return _SHA256.fullmatch(sha256) is not None and (trust_folder() / sha256).is_file()
    except OSError:
        return False
