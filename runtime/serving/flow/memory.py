"""How much memory there is for the KV cache."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from hivtp.runtime.language import RemoteBackend
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.runtime.language.base import LanguageBackend
    from hivtp.runtime.serving.settings import ServerSettings

# The rest is for the vision stage, images and embeddings.
KV_SHARE = 0.5


@dataclass(frozen=True)
class KvMemory:
    """How much of the KV cache there is.

    Attributes:
        max_positions: of a prompt and its answer.
        max_bytes: of all; None where it lies in another server.
        position_bytes: of one position.
    """

    max_positions: int
    max_bytes: int | None = None
    position_bytes: int = 0

    @classmethod
    def of(cls, language: LanguageBackend | RemoteBackend, settings: ServerSettings) -> Self:
        """What a backend may take.

        Raises:
            SettingsError: not even a short request would fit.
        """
        context = min(settings.max_context or language.context_length, language.context_length)
        if isinstance(language, RemoteBackend):
            return cls(context)
        position_bytes = language.kv_bytes_per_position
        most = settings.num_slots * context * position_bytes
        budget = settings.max_kv_bytes or kv_budget()
        max_bytes = most if budget is None else min(budget, most)
        max_positions = min(context, max_bytes // position_bytes)
        if max_positions < 2:
            raise SettingsError(
                f"the KV cache may take {max_bytes} bytes, and one position takes {position_bytes}; give more memory "
                "(max_kv_bytes)"
            )
        return cls(max_positions, max_bytes, position_bytes)

    def share(self, num_positions: int) -> float:
        """Of all that this many positions take, 0 to 1."""
        return 0.0 if self.max_bytes is None else num_positions * self.position_bytes / self.max_bytes


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
