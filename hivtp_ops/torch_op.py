"""The rule as a PyTorch op: eager, torch.compile and torch.export, on any device, without a host sync."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

from hivtp_ops.errors import KernelError, ScoreError
from hivtp_ops.kernel import MAX_PATCHES
from hivtp_ops.op import NO_KEEP, OUTPUTS, TORCH_NAME
from hivtp_ops.spec import PruningSpec
from hivtp_ops.tables import rank_tables
from hivtp_ops.torch_kernel import TorchKernel, load_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Op = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_registered_op: Op | None = None


def register() -> Op:
    """Register the op with PyTorch, once, and give it.

    The functions below do so by themselves, except while torch.compile traces them: call this before it.
    """
    global _registered_op
    if _registered_op is None:
        import torch

        schema = (
            "(Tensor importance, int rows, int cols, int regions, float global_ratio, int window, int keep)"
            f" -> (Tensor {OUTPUTS[0]}, Tensor {OUTPUTS[1]})"
        )
        custom_op = torch.library.custom_op(TORCH_NAME, _select, mutates_args=(), schema=schema)
        custom_op.register_kernel("cuda", _select_on_cuda)
        custom_op.register_fake(_fake_select)
        _registered_op = custom_op
    return _registered_op


def hierarchical_prune(
    importance: torch.Tensor,
    rows: int,
    cols: int,
    regions: int,
    global_ratio: float,
    window: int,
    keep: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rule that `hivtp_ops.select` defines to every tile by itself.

    On a GPU it is one kernel, which the first call compiles: call it once before a CUDA graph is captured. Where the
    kernel cannot be compiled, of which a warning tells, or the grid is too large for it, PyTorch's own operators do
    the work, with the same result.

    Args:
        importance: [tiles, rows * cols] floating; converted to float32. NaN is not looked for, since that
            would wait for the device: a tile with NaN in it gives outputs of the right shape that mean
            nothing, and the other tiles are not touched by it.
        rows: rows of the patch grid.
        cols: columns of the patch grid.
        regions: as in PruningSpec, like the rest.
        global_ratio: see regions.
        window: see regions.
        keep: exact count; -1 keeps what the two stages give.

    Returns:
        `kept_indices` [tiles, capacity] int64, ascending, then -1, and `kept_counts` [tiles] int64, on the
        device of `importance`.

    Raises:
        SpecError: the settings are not valid, or do not fit the grid.
        ScoreError: `importance` has another shape or is not floating.
    """
    kept_indices, kept_counts = register()(importance, rows, cols, regions, global_ratio, window, keep)
    return kept_indices, kept_counts


def prune(importance: torch.Tensor, grid: tuple[int, int], spec: PruningSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `hierarchical_prune` with the settings of a spec.

    Args:
        importance: see hierarchical_prune.
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.

    Returns:
        See hierarchical_prune.
    """
    keep = NO_KEEP if spec.keep is None else spec.keep
    return hierarchical_prune(importance, *grid, spec.regions, spec.global_ratio, spec.window, keep)


def _select(
    importance: torch.Tensor, rows: int, cols: int, regions: int, global_ratio: float, window: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    grid, spec = (rows, cols), _spec(regions, global_ratio, window, keep)
    _check(importance, grid)
    capacity, num_sorted, tables = _constants(grid, spec, importance.device)
    num_tiles, num_patches = importance.shape
    scores = importance.float()

    best_first = scores.sort(dim=1, descending=True, stable=True).indices
    raster = torch.arange(num_patches, device=scores.device).expand(num_tiles, -1)
    ranks = torch.empty_like(best_first).scatter_(1, best_first, raster)
    can_keep = scores > -torch.inf

    of_region = torch.where(tables["is_region_pad"], tables["region_pad"], ranks[:, tables["region_members"]])
    best_of_region = of_region.topk(num_sorted, dim=2, largest=False).values
    is_global = can_keep & (ranks <= best_of_region.flatten(1)[:, tables["last_kept_at"]])

    free = torch.where(can_keep & ~is_global, ranks, num_patches)
    best_of_window = free[:, tables["window_members"]].amin(dim=2)
    is_local = ranks == best_of_window[:, tables["window_ids"]]

    # A place that holds no patch takes num_patches here, so that it sorts to the end.
    if spec.keep is None:
        kept = torch.where(is_global | is_local, raster, num_patches)
    else:
        stages = torch.where(can_keep, 2, 3).where(~is_local, 1).where(~is_global, 0)
        order = (stages * num_patches + ranks).topk(spec.keep, dim=1, largest=False, sorted=False)
        kept = torch.where(order.values < 3 * num_patches, order.indices, num_patches)
    kept = kept.sort(dim=1).values[:, :capacity]
    is_patch = kept < num_patches
    return torch.where(is_patch, kept, -1), is_patch.sum(dim=1)


def _select_on_cuda(
    importance: torch.Tensor, rows: int, cols: int, regions: int, global_ratio: float, window: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    grid, spec = (rows, cols), _spec(regions, global_ratio, window, keep)
    _check(importance, grid)
    kernel = _kernel(grid, spec, torch.cuda.get_device_capability(importance.device))
    if kernel is None:
        return _select(importance, rows, cols, regions, global_ratio, window, keep)
    return kernel(importance.float())


def _fake_select(
    importance: torch.Tensor, rows: int, cols: int, regions: int, global_ratio: float, window: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    grid = (rows, cols)
    _check(importance, grid)
    num_tiles, capacity = importance.shape[0], _spec(regions, global_ratio, window, keep).capacity(grid)
    return (
        importance.new_empty((num_tiles, capacity), dtype=torch.int64),
        importance.new_empty((num_tiles,), dtype=torch.int64),
    )


def _spec(regions: int, global_ratio: float, window: int, keep: int) -> PruningSpec:
    return PruningSpec(
        regions=regions, global_ratio=global_ratio, window=window, keep=None if keep == NO_KEEP else keep
    )


def _check(importance: torch.Tensor, grid: tuple[int, int]) -> None:
    rows, cols = grid
    if importance.dim() != 2 or importance.shape[1] != rows * cols or not importance.is_floating_point():
        raise ScoreError(
            f"importance is {importance.dtype} of shape {tuple(importance.shape)}; "
            f"a {rows} x {cols} grid takes floating [tiles, {rows * cols}]"
        )


@functools.cache
def _kernel(grid: tuple[int, int], spec: PruningSpec, capability: tuple[int, int]) -> TorchKernel | None:
    """Give the kernel; None where the grid is too large for it or, after a warning, where it cannot be compiled."""
    if grid[0] * grid[1] > MAX_PATCHES:
        return None
    try:
        return load_kernel(grid, spec, capability)
    except KernelError as error:
        warnings.warn(f"pruning on the GPU without its kernel, which takes longer: {error}", stacklevel=2)
        return None


@functools.lru_cache(maxsize=32)
def _constants(
    grid: tuple[int, int], spec: PruningSpec, device: torch.device
) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Give the capacity, `num_sorted` and the tables; kept, since sending them to a GPU waits for it."""
    import torch

    constants = vars(rank_tables(grid, spec)).copy()
    num_sorted = constants.pop("num_sorted")
    tables = {name: torch.from_numpy(table).to(device) for name, table in constants.items()}
    return spec.capacity(grid), num_sorted, tables
