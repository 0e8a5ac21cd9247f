"""How a patch grid is cut into regions and into windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def region_ids(grid: tuple[int, int], regions: int) -> NDArray[np.int64]:
    """Give the region of every patch, regions numbered in raster order.

    Region i of an axis spans `floor(i * size / regions)` up to `floor((i + 1) * size / regions)`.

    Args:
        grid: rows and columns of patches.
        regions: regions along each axis, at most the shorter side of the grid.

    Returns:
        [patches] int64, values in 0 .. regions * regions - 1.
    """

    def along(size: int) -> NDArray[np.int64]:
        ends = np.arange(1, regions + 1) * size // regions
        return np.searchsorted(ends, np.arange(size), side="right")

    rows, cols = grid
    return (along(rows)[:, None] * regions + along(cols)[None, :]).reshape(-1)


def window_ids(grid: tuple[int, int], window: int) -> NDArray[np.int64]:
    """Give the window of every patch, windows numbered in raster order from the top left.

    The windows at the right and at the bottom edge are smaller where the side is not a multiple of `window`.

    Args:
        grid: rows and columns of patches.
        window: side of a window, in patches.

    Returns:
        [patches] int64, values in 0 .. number of windows - 1.
    """
    rows, cols = grid
    num_across = -(-cols // window)
    return (np.arange(rows)[:, None] // window * num_across + np.arange(cols)[None, :] // window).reshape(-1)


def members(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """List the patches of every group.

    Args:
        ids: [patches] int64, the group of each patch; every group has at least one.

    Returns:
        [groups, size of the largest group] int64: raster indices in ascending order, then -1.
    """
    sizes = np.bincount(ids)
    table = np.full((len(sizes), sizes.max()), -1, dtype=np.int64)
    for group, size in enumerate(sizes):
        table[group, :size] = np.flatnonzero(ids == group)
    return table
