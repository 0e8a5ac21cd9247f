"""The CUDA kernel as a TensorRT plugin, which the ONNX parser takes in place of the op's function.

TensorRT reads the annotations below, and takes none that are strings: no `from __future__ import annotations` here.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from hivtp_ops.errors import MissingExtraError
from hivtp_ops.kernel import MIN_CAPABILITY, Kernel, hierarchical_prune_kernel
from hivtp_ops.kernel import NAME as KERNEL_NAME
from hivtp_ops.nvrtc import compile_kernel
from hivtp_ops.op import NAME, NO_KEEP, PLUGIN_NAMESPACE
from hivtp_ops.spec import PruningSpec

PLUGIN_ID = f"{PLUGIN_NAMESPACE}::{NAME}"
# PTX, since that is what TensorRT documents. It runs on any GPU from this one on, as plans may that are built for all.
TARGET = "compute_{}{}".format(*MIN_CAPABILITY)
# An attribute is an array of one number: TensorRT 10 makes `int(array)` of one that is annotated as int, which is an
# error in recent numpy.
Int = NDArray[np.int64]
Float = NDArray[np.float64]


@functools.cache
def register_plugin() -> None:
    """Register `hivtp::HierarchicalPrune` with TensorRT, for all graphs that are parsed in this process from now on.

    Only building a plan needs it: the plan holds the compiled kernel. A graph that is parsed where the plugin is not
    registered takes the function in its place, and gives the same: so do not register it for a GPU below
    `hivtp_ops.kernel.MIN_CAPABILITY`.

    The importance must be float32 in the graph; it is in every graph that `hivtp export` writes.

    Raises:
        MissingExtraError: tensorrt is not installed.
        KernelError: kernels cannot be compiled here.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise MissingExtraError("tensorrt", "tensorrt") from error
    # What is missing shows here, where the function can still be taken, and not in the middle of a build.
    compile_kernel("", TARGET)

    @trtp.register(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def describe(
        importance: trtp.TensorDesc, rows: Int, cols: Int, regions: Int, global_ratio: Float, window: Int, keep: Int
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        grid, spec = _settings(rows, cols, regions, global_ratio, window, keep)
        num_tiles, capacity = importance.shape_expr[0], spec.capacity(grid)
        return (
            trtp.from_shape_expr((num_tiles, capacity), dtype=trt.int64),
            trtp.from_shape_expr((num_tiles,), dtype=trt.int64),
        )

    @trtp.autotune(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def formats(
        importance: trtp.TensorDesc,  # noqa: ARG001  the names and their order are TensorRT's
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],  # noqa: ARG001
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("FP32, INT64, INT64", "LINEAR")]

    # TensorRT calls it with every attribute in place, although it lets one declare fewer.
    @trtp.aot_impl(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def implement(
        importance: trtp.TensorDesc,
        rows: Int,
        cols: Int,
        regions: Int,
        global_ratio: Float,
        window: Int,
        keep: Int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],  # noqa: ARG001
        tactic: int,  # noqa: ARG001
    ) -> tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        kernel, ptx = _compiled(*_settings(rows, cols, regions, global_ratio, window, keep))
        launch = trtp.KernelLaunchParams(grid_x=importance.shape_expr[0], block_x=kernel.num_threads)
        return KERNEL_NAME, ptx, launch, trtp.SymIntExprs(0)


# TensorRT asks several times in one build.
@functools.cache
def _compiled(grid: tuple[int, int], spec: PruningSpec) -> tuple[Kernel, bytes]:
    kernel = hierarchical_prune_kernel(grid, spec)
    return kernel, compile_kernel(kernel.source, TARGET)


def _settings(
    rows: Int, cols: Int, regions: Int, global_ratio: Float, window: Int, keep: Int
) -> tuple[tuple[int, int], PruningSpec]:
    spec = PruningSpec(
        regions=regions.item(),
        global_ratio=global_ratio.item(),
        window=window.item(),
        keep=None if keep.item() == NO_KEEP else keep.item(),
    )
    return (rows.item(), cols.item()), spec
