"""RankTables: the constants of one grid and spec, for the forms of the rule that work on whole tensors.

Those forms turn the scores into ranks (0 is the best patch of the tile; ranks are unique, so that no tie is
left) and then find each stage by comparing every patch's rank with one of its region's or its window's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp_ops.partition import members, region_ids, window_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp_ops.spec import PruningSpec


@dataclass(frozen=True)
class RankTables:
    """Constants of one grid and spec.

    Attributes:
        region_members: [regions, 1 + largest region] int64, the patches of each region, and 0 elsewhere.
        is_region_pad: the same shape, bool, True where region_members names no patch.
        region_pad: the same shape, int64, the rank to use there: -1 in the first column, so that a region's
            sorted ranks have at index `quota` the last that is kept, also where the quota is 0; the number of
            patches, which is worse than any rank, at the end.
        num_sorted: how many of a region's sorted ranks are looked at, 1 + the largest quota.
        last_kept_at: [patches] int64, where in the sorted ranks [regions * num_sorted] the last rank that is
            kept of the patch's region stands.
        window_members: [windows, largest window] int64, the patches of each window; a smaller window repeats
            its first patch, which leaves its best rank as it is.
        window_ids: [patches] int64, the window of each patch.
    """

    region_members: NDArray[np.int64]
    is_region_pad: NDArray[np.bool_]
    region_pad: NDArray[np.int64]
    num_sorted: int
    last_kept_at: NDArray[np.int64]
    window_members: NDArray[np.int64]
    window_ids: NDArray[np.int64]


def rank_tables(grid: tuple[int, int], spec: PruningSpec) -> RankTables:
    """Work out the constants.

    Args:
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.

    Raises:
        SpecError: the spec does not fit the grid.
    """
    quotas = spec.quotas(grid)
    num_sorted = 1 + int(quotas.max())
    of_region = region_ids(grid, spec.regions)
    region_members = np.pad(members(of_region), ((0, 0), (1, 0)), constant_values=-1)
    is_region_pad = region_members < 0
    region_pad = np.full_like(region_members, len(of_region))
    region_pad[:, 0] = -1

    of_window = window_ids(grid, spec.window)
    window_members = members(of_window)
    window_members = np.where(window_members < 0, window_members[:, :1], window_members)
    return RankTables(
        region_members=np.where(is_region_pad, 0, region_members),
        is_region_pad=is_region_pad,
        region_pad=region_pad,
        num_sorted=num_sorted,
        last_kept_at=(np.arange(len(quotas)) * num_sorted + quotas)[of_region],
        window_members=window_members,
        window_ids=of_window,
    )
