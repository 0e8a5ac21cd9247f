"""Arrays of the host as tensors on a device, and back, where the host need not wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike


def upload(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A copy of an array on a device, or the array itself on the CPU; the host does not wait."""
    return pinned(array).to(device, non_blocking=True) if device.type == "cuda" else to_tensor(array)


def pinned(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A copy in pinned memory, out of which a GPU reads while the host goes on."""
    return to_tensor(array).pin_memory()


def to_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor; a copy of one that must not be written to, of which torch would warn."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    # numpy has no bfloat16 of its own, and torch does not know the one that ml_dtypes adds.
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which holds the values once the stream was waited for."""
    import torch

    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def torch_dtype(dtype: DTypeLike) -> torch.dtype:
    """A dtype of numpy in torch."""
    return to_tensor(np.empty(0, dtype)).dtype
