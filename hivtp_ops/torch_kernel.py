"""The CUDA kernel on PyTorch's tensors: compiled at the first call, then launched on the current stream."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import KernelError
from hivtp_ops.kernel import MIN_CAPABILITY, NAME, hierarchical_prune_kernel
from hivtp_ops.nvrtc import compile_kernel

if TYPE_CHECKING:
    import torch

    from hivtp_ops.spec import PruningSpec


@dataclass(frozen=True)
class TorchKernel:
    """The kernel of one grid and spec, loaded for one kind of GPU.

    Attributes:
        function: handle of the driver, good on every GPU of the kind.
        num_threads: threads of a block.
        capacity: places per tile in the output.
    """

    function: Any
    num_threads: int
    capacity: int

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prune, without waiting for the GPU.

        Args:
            scores: [tiles, patches] float32 on the GPU.

        Returns:
            `kept_indices` [tiles, capacity] int64 and `kept_counts` [tiles] int64 on the same GPU.

        Raises:
            KernelError: the driver refuses the launch.
        """
        import torch
        from cuda.bindings import driver

        scores = scores.contiguous()
        num_tiles = len(scores)
        indices = torch.empty((num_tiles, self.capacity), dtype=torch.int64, device=scores.device)
        counts = torch.empty((num_tiles,), dtype=torch.int64, device=scores.device)
        if num_tiles == 0:
            return indices, counts
        arguments = tuple(tensor.data_ptr() for tensor in (scores, indices, counts))
        with torch.cuda.device(scores.device):
            _make_context_current(driver, scores.device)
            stream = torch.cuda.current_stream().cuda_stream
            grid, block = (num_tiles, 1, 1), (self.num_threads, 1, 1)
            types = (ctypes.c_void_p,) * len(arguments)
            _checked(driver.cuLaunchKernel(self.function, *grid, *block, 0, stream, (arguments, types), 0))
        return indices, counts


def load_kernel(grid: tuple[int, int], spec: PruningSpec, capability: tuple[int, int]) -> TorchKernel:
    """Compile and load the kernel, for good, since a CUDA graph may hold it; not while one is captured.

    Args:
        grid: rows and columns of patches.
        spec: the settings; its layers play no part here.
        capability: compute capability of the GPU.

    Raises:
        KernelError: it cannot be compiled or loaded here.
        SpecError: the grid has more patches than the kernel takes.
    """
    if capability < MIN_CAPABILITY:
        raise KernelError(
            "this GPU has compute capability {}.{}, and the kernel needs {}.{}".format(*capability, *MIN_CAPABILITY)
        )
    kernel = hierarchical_prune_kernel(grid, spec)
    cubin = compile_kernel(kernel.source, "sm_{}{}".format(*capability))
    from cuda.bindings import driver

    library = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
    function = _checked(driver.cuLibraryGetKernel(library, NAME.encode()))
    return TorchKernel(driver.CUfunction(int(function)), kernel.num_threads, spec.capacity(grid))


def _make_context_current(driver: Any, device: torch.device) -> None:
    # PyTorch binds a thread to the GPU's context only when that thread first makes it do some work.
    if int(_checked(driver.cuCtxGetCurrent())) == 0:
        ordinal = _checked(driver.cuDeviceGet(device.index))
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(ordinal))))


def _checked(results: tuple[Any, ...]) -> Any:
    result, *values = results
    if int(result) != 0:
        raise KernelError(f"the CUDA driver answers {result.name} to the pruning kernel")
    return values[0] if values else None
