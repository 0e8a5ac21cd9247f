"""How much memory there is for the KV cache."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

# The rest is for the vision stage, images and embeddings.
KV_SHARE = 0.5


def kv_budget() -> int | None:
    """Half of the memory that this process may still take, in bytes; None where the system does not tell."""
    found = [size for size in (_free_bytes(), _container_bytes()) if size is not None]
    return int(min(found) * KV_SHARE) if found else None


def _free_bytes() -> int | None:
    """What the kernel could hand out without swapping."""
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    return None


def _container_bytes() -> int | None:
    """What the container has left, under a limit of its own."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    return None
