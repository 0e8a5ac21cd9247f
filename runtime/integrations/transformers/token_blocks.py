"""Where the tokens of the unpruned model come from, image by image, and which of them stay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout
    from hivtp.runtime.vision.packing import NewlineRule

# Stands where the unpruned model has its `image_newline`, which is a token of no tile.
NEWLINE = -1


def image_blocks(
    layouts: Sequence[TileLayout], grid: tuple[int, int], num_class_tokens: int
) -> list[NDArray[np.int64]]:
    """The unpruned tokens of LLaVA-NeXT images: for each, its base tile and then its unpadded view.

    A block [rows, tokens] holds rows of the tower's output [tiles * (class tokens + patches)], or NEWLINE.
    """
    (rows, cols), blocks, start = grid, [], 0
    for layout in layouts:
        shape = layout.num_tiles, num_class_tokens + rows * cols
        base, *tiles = np.arange(start, start + math.prod(shape)).reshape(shape)[:, num_class_tokens:]
        view = np.reshape(tiles, (layout.tile_rows, layout.tile_cols, rows, cols)).swapaxes(1, 2)
        view = view.reshape(layout.tile_rows * rows, -1)[layout.patch_rows(grid), layout.patch_cols(grid)]
        blocks += [base[None], np.pad(view, ((0, 0), (0, 1)), constant_values=NEWLINE)]
        start += math.prod(shape)
    return blocks


def keep_tokens(block: NDArray[np.int64], stays: NDArray[np.bool_], rule: NewlineRule) -> NDArray[np.bool_]:
    """Which tokens of a block stay, given that of every row of the tower's output."""
    is_newline = block == NEWLINE
    is_kept: NDArray[np.bool_] = stays[block] & ~is_newline
    if rule != "none":
        is_kept |= is_newline & (is_kept.any(axis=1, keepdims=True) | (rule == "all"))
    return is_kept
