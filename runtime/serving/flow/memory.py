"""How much memory there is for the KV cache."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# The rest is for the vision stage, images and embeddings.
KV_SHARE = 0.5


def kv_budget(root: Path = Path("/")) -> int | None:
    """Half of the memory that this process may still take, in bytes; None where the system does not tell.

    Args:
        root: of the file system, below which the kernel tells.
    """
    found = [*_free_bytes(root / "proc" / "meminfo"), *_group_bytes(root)]
    return int(max(0, min(found)) * KV_SHARE) if found else None


def _free_bytes(file: Path) -> Iterator[int]:
    """What the kernel could hand out without swapping."""
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.MULTILINE)
        if match:
            yield int(match[1]) * 1024


def _group_bytes(root: Path) -> Iterator[int]:
    """What is left under the limits of the container or the service, and of all that these are part of."""
    top = root / "sys" / "fs" / "cgroup"
    path = PurePosixPath("/")
    with contextlib.suppress(OSError):
        match = re.search(r"^0::(/.*)$", (root / "proc" / "self" / "cgroup").read_text(), re.MULTILINE)
        path = PurePosixPath(match[1]) if match else path
    for group in (path, *path.parents):
        folder = top / group.relative_to("/")
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
