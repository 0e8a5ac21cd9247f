"""The embeddings of images seen before, bounded in bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from hivtp.runtime.inputs.prepared_image import PreparedImage
    from hivtp.runtime.vision.encoder import EncodedImage, ImageEncoder, TileFrame, TokenCount, View


class EmbeddingCache:
    """An LRU cache of encoded images by their digest. Several threads may use it at once.

    Args:
        max_bytes: what all entries may hold together; 0 keeps none.

    Attributes:
        num_bytes: what they hold.
        num_queries, num_hits: how often it was asked, and had an answer.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.num_queries = self.num_hits = 0
        self._entries: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: bytes) -> EncodedImage | None:
        """The image of a digest, which becomes the most recently used; None where there is none."""
        with self._lock:
            self.num_queries += 1
            entry = self._entries.get(digest)
            if entry is not None:
                self.num_hits += 1
                self._entries.move_to_end(digest)
            return entry

    def put(self, image: EncodedImage) -> None:
        """Add an image, and drop the least recently used ones that no longer fit; one too large is not kept."""
        if image.num_bytes > self.max_bytes:
            return
        with self._lock:
            if image.digest in self._entries:
                return
            # Room first, so that the bound holds at every moment, also for those who look without the lock.
            while self.num_bytes + image.num_bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.num_bytes -= dropped.num_bytes
            self._entries[image.digest] = image
            self.num_bytes += image.num_bytes

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0


class CachedEncoder:
    """Another encoder, with a cache before it: an image that was encoded before costs no vision time.

    Args:
        encoder: encodes what the cache does not hold.
        cache: may be shared between threads.
        description: of what encodes, for people.
    """

    def __init__(self, encoder: ImageEncoder, cache: EmbeddingCache, description: str) -> None:
        self.cache = cache
        self.description = description
        self._encoder = encoder

    def prepare(self, image: Image.Image) -> PreparedImage:
        """See ImageEncoder.prepare."""
        return self._encoder.prepare(image)

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See ImageEncoder.encode."""
        digests = [image.digest for image in images]
        found = {digest: encoded for digest in set(digests) if (encoded := self.cache.get(digest)) is not None}
        missing = {image.digest: image for image in images if image.digest not in found}
        for encoded in self.encode_anew(list(missing.values())):
            found[encoded.digest] = encoded
            # Later answers come from the same arrays.
            for array in encoded.arrays:
                array.flags.writeable = False
            self.cache.put(encoded)
        return [found[digest] for digest in digests]

    def encode_anew(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """The same without the cache."""
        return self._encoder.encode(images)

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """See ImageEncoder.frames."""
        return self._encoder.frames(image)

    def views(self, image_size: tuple[int, int]) -> list[View]:
        """See ImageEncoder.views."""
        return self._encoder.views(image_size)

    def count_tokens(self, image_size: tuple[int, int]) -> TokenCount:
        """See ImageEncoder.count_tokens."""
        return self._encoder.count_tokens(image_size)

    def close(self) -> None:
        """Release the encoder's engine and drop all entries."""
        self.cache.clear()
        del self._encoder
