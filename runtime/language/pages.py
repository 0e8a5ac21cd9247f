"""Memory that the operating system gives page by page as it is written, and takes back."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Pages:
    """An array of zeros in memory of its own, of which only what was written takes memory.

    Not `np.zeros`: for large arrays numpy asks for huge pages of 2 MiB. In a KV cache the positions of each head lie
    together, so that one short sequence would touch a huge page of every head, and take the memory of its whole slot.

    Args:
        shape, dtype: of the array.

    Attributes:
        array: the zeros; it keeps the memory.

    Raises:
        MemoryError: there is no memory of this size.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no memory for {num_bytes} bytes: {error}") from error
        # A kernel without huge pages refuses.
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: NDArray[Any] = np.frombuffer(self._memory, dtype).reshape(shape)

    def release(self, start: int, stop: int) -> None:
        """Give memory back; what lay there reads as zeros after this, or as it was where a page is shared.

        Args:
            start: first byte of the array that nobody needs.
            stop: the byte after the last one. Pages that lie in the range only in part stay.
        """
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
