"""How a LLaVA-NeXT image lies on its tiles, and which patches its padding takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class TileLayout:
    """How an image lies on its tiles.

    Tile 0 is the base tile, the whole image. The others follow in raster order; together they show the
    image once more, larger, with padding on two opposite sides where its shape is not that of the tile grid.
    An image of several in LLaVA-OneVision has the base tile alone: a grid of 0 x 0.

    Attributes:
        tile_rows: rows of the tile grid, which does not count the base tile.
        tile_cols: columns of the tile grid.
        image_size: (height, width) of the original image in pixels.
    """

    tile_rows: int
    tile_cols: int
    image_size: tuple[int, int]

    @classmethod
    def on(cls, pinpoints: Sequence[tuple[int, int]], tile_size: int, image_size: tuple[int, int]) -> TileLayout:
        """Lay an image on the tile grid that shows most of its pixels, then wastes least; of equals the first.

        Args:
            pinpoints: (height, width) of every tile grid in pixels, multiples of `tile_size`.
            tile_size: side of a tile in pixels.
            image_size: (height, width) of the image in pixels.
        """
        image_height, image_width = image_size

        def goodness(pinpoint: tuple[int, int]) -> tuple[int, int]:
            height, width = pinpoint
            scale = min(width / image_width, height / image_height)
            num_shown = min(int(image_width * scale) * int(image_height * scale), image_width * image_height)
            return num_shown, num_shown - width * height

        height, width = max(pinpoints, key=goodness)
        return cls(height // tile_size, width // tile_size, image_size)

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the base tile included."""
        return 1 + self.tile_rows * self.tile_cols

    def patch_rows(self, grid: tuple[int, int]) -> slice:
        """Give the rows of patches of the whole tile grid that the model keeps when it unpads.

        The slice is empty where the image is so wide that it is less than one row of patches high.

        Args:
            grid: rows and columns of patches in one tile.
        """
        return self._unpadded(grid)[0]

    def patch_cols(self, grid: tuple[int, int]) -> slice:
        """Give the columns of patches of the whole tile grid that remain; see `patch_rows`."""
        return self._unpadded(grid)[1]

    def patch_mask(self, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """Tell the patches of the image from those of the padding.

        Args:
            grid: rows and columns of patches in one tile.

        Returns:
            [num_tiles, patches] bool, True for a patch of the image; the base tile has no padding.
        """
        rows, cols = grid
        image = np.zeros((self.tile_rows * rows, self.tile_cols * cols), np.bool_)
        image[self._unpadded(grid)] = True
        tiles = image.reshape(self.tile_rows, rows, self.tile_cols, cols).swapaxes(1, 2)
        return np.concatenate([np.ones((1, rows * cols), np.bool_), tiles.reshape(-1, rows * cols)])

    def _unpadded(self, grid: tuple[int, int]) -> tuple[slice, slice]:
        # As transformers' unpad_image has it, operation by operation: floats decide which rows go, and rounding to 7
        # places is what keeps a product of 2.9999999999999996 from losing one.
        if self.num_tiles == 1:
            return slice(0, 0), slice(0, 0)
        height, width = self.image_size
        rows, cols = self.tile_rows * grid[0], self.tile_cols * grid[1]
        if width / height > cols / rows:
            padding = (rows - int(round(height * (cols / width), 7))) // 2
            return slice(padding, rows - padding), slice(0, cols)
        padding = (cols - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(padding, cols - padding)
