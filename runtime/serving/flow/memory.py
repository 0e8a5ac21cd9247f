"""How much memory there is for the KV cache."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hivtp.runtime.language import RemoteBackend
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
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
        max_bytes = min(settings.max_kv_bytes or kv_budget() or most, most)
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
