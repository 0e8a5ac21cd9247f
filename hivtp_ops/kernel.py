"""The CUDA kernel of the rule: its source for one grid and spec, and how it is launched."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from hivtp_ops.spec import PruningSpec

NAME = "hierarchical_prune"
# What a key has bits for; the arrays of a block then take 42 of the 48 KiB that they may take.
MAX_PATCHES = 4096
# Of a GPU that has the instructions it takes: Ampere and later.
MIN_CAPABILITY = (8, 0)
MAX_THREADS = 1024
WARP = 32


@dataclass(frozen=True)
class Kernel:
    """The kernel for one grid and spec.

    Attributes:
        source: CUDA C++ without includes. It defines `extern "C" __global__ void hierarchical_prune(importance,
            kept_indices, kept_counts)`, all three pointers to contiguous arrays of the shapes and dtypes of
            `hivtp_ops.op`.
        num_threads: threads of a block. There is a block for each tile, and no dynamic shared memory.
    """

    source: str
    num_threads: int


def hierarchical_prune_kernel(grid: tuple[int, int], spec: PruningSpec) -> Kernel:
    """Write the kernel that does what `hivtp_ops.select` defines.

    The settings are constants of the source, not arguments: the compiler then turns divisions by them into
    multiplications and sizes the shared memory, TensorRT passes 32-bit integers only, and one process uses few specs.

    NaN is not looked for: a tile with NaN in it gives indices in range that mean nothing.

    Args:
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.

    Raises:
        SpecError: the spec does not fit the grid, or the grid has more than MAX_PATCHES patches.
    """
    quotas = spec.quotas(grid)
    num_patches = math.prod(grid)
    if num_patches > MAX_PATCHES:
        raise SpecError(
            f"a {grid[0]} x {grid[1]} grid has {num_patches} patches, and the CUDA kernel takes at most "
            f"{MAX_PATCHES}; use hivtp_ops.select or the ONNX function"
        )
    num_threads = min(MAX_THREADS, -(-num_patches // WARP) * WARP)
    constants = {
        "ROWS": grid[0],
        "COLS": grid[1],
        "REGIONS": spec.regions,
        "WINDOW": spec.window,
        "CAPACITY": spec.capacity(grid),
        "IS_EXACT": int(spec.keep is not None),
        "NUM_THREADS": num_threads,
    }
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    lines.append(f"__constant__ short QUOTAS[] = {{{', '.join(map(str, quotas.tolist()))}}};")
    return Kernel("\n".join([*lines, "", _body()]), num_threads)


@functools.cache
def _body() -> str:
    return files("hivtp_ops").joinpath("kernels", f"{NAME}.cu").read_text(encoding="utf-8")
