"""The embeddings of pictures seen before, bounded in bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from hivtp.runtime.image_encoder import EncodedImage

DEFAULT_CACHE_BYTES = 256 * 2**20


class EmbeddingCache:
    """An LRU cache of encoded pictures by the digest of their content. Several threads may use it at once.

    Args:
        max_bytes: what all entries may hold together; 0 keeps none.

    Raises:
        SettingsError: `max_bytes` is negative or no whole number.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise SettingsError(f"the size of the cache must be a whole number of bytes, 0 or more, not {max_bytes!r}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> EncodedImage | None:
        """The entry of a key, which becomes the most recently used; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, key: bytes, image: EncodedImage) -> None:
        """Add an entry, and drop the least recently used ones that no longer fit; one too large is not kept."""
        if image.num_bytes > self.max_bytes:
            return
        with self._lock:
            if key in self._entries:
                return
            # Room first, so that the bound holds at every moment, also for those who look without the lock.
            while self.num_bytes + image.num_bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.num_bytes -= dropped.num_bytes
            self._entries[key] = image
            self.num_bytes += image.num_bytes
