"""Memory of a device, as an array that is not on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike


class View:
    """Memory of a device as an array, or a range of whole rows of it.

    Args:
        owner: what the memory belongs to, such as an `onnxruntime.OrtValue`; it lives as long as a view of it.
        shape, dtype: how its memory is read.
        address: where it begins.
    """

    def __init__(self, owner: Any, shape: Sequence[int], dtype: DTypeLike, address: int) -> None:
        self.owner = owner
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.address = address

    @property
    def nbytes(self) -> int:
        """Bytes that it spans."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> View:
        """A range of the first dimension."""
        row_bytes = self.nbytes // self.shape[0]
        return View(self.owner, (stop - start, *self.shape[1:]), self.dtype, self.address + start * row_bytes)

    def reshape(self, *shape: int) -> View:
        """The same memory in another shape, of which one length may be -1."""
        num = int(np.prod(self.shape))
        known = int(np.prod([length for length in shape if length != -1]))
        lengths = [num // known if length == -1 else length for length in shape]
        return View(self.owner, lengths, self.dtype, self.address)
