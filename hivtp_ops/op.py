"""The op `hivtp::HierarchicalPrune`: its name in every system, and its attributes.

`importance [tiles, patches] float32 -> kept_indices [tiles, capacity] int64, kept_counts [tiles] int64`.
`capacity` is static (`PruningSpec.capacity`), an index beyond the count is -1, and `hivtp_ops.select` is the
definition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from hivtp_ops.spec import PruningSpec

DOMAIN = "hivtp"
NAME = "HierarchicalPrune"
PLUGIN_NAMESPACE = "hivtp"
TORCH_NAME = "hivtp::hierarchical_prune"

INPUT = "importance"
OUTPUTS = ("kept_indices", "kept_counts")
ATTRIBUTES = ("rows", "cols", "regions", "global_ratio", "window", "keep")
NO_KEEP = -1


def attributes(grid: tuple[int, int], spec: PruningSpec) -> dict[str, int | float]:
    """Give the op's attributes, in the order of ATTRIBUTES.

    An attribute of an ONNX node or of a plugin is float32, and rounding a ratio down to float32 can cost a
    patch (0.7 of 100 becomes 69), so `global_ratio` is the nearest float32 that gives the quotas of `spec`.

    Args:
        grid: rows and columns of patches.
        spec: the settings; `keep=None` becomes NO_KEEP.

    Raises:
        SpecError: the spec does not fit the grid, or no float32 ratio gives its quotas.
    """
    quotas = spec.quotas(grid)
    nearest = np.float32(spec.global_ratio)
    for ratio in (nearest, np.nextafter(nearest, np.float32(1)), np.nextafter(nearest, np.float32(0))):
        if np.array_equal(replace(spec, global_ratio=float(ratio)).quotas(grid), quotas):
            break
    else:
        raise SpecError(
            f"global_ratio {spec.global_ratio} gives {quotas.tolist()} patches per region, which no float32 "
            "near it gives; use a ratio with fewer digits"
        )
    rows, cols = grid
    keep = NO_KEEP if spec.keep is None else spec.keep
    return dict(zip(ATTRIBUTES, (rows, cols, spec.regions, float(ratio), spec.window, keep), strict=True))
