"""An image as the vision graph takes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout


@dataclass(frozen=True)
class PreparedImage:
    """An image, resized and normalised.

    Attributes:
        pixel_values: [tiles, 3, side, side] float32, the base tile first.
        layout: how the tiles lie on the image; None where the image is one tile.
    """

    pixel_values: NDArray[np.float32]
    layout: TileLayout | None

    @cached_property
    def digest(self) -> bytes:
        """A digest of the pixels and of what else decides the tokens."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.pixel_values).data, digest_size=32)
        digest.update(repr((self.pixel_values.shape, self.layout)).encode())
        return digest.digest()
