"""Embeddings gathered as a tensor, where a transformers model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.torch.memory import torch_dtype, upload
from hivtp.engines.view import View
from hivtp.runtime.device_rows import TOKENS, DeviceRows

if TYPE_CHECKING:
    import torch

    from hivtp.runtime.device_rows import Embeddings


def gather(embeds: Embeddings, table: torch.Tensor) -> torch.Tensor:
    """Embeddings as a tensor, on the device and in the dtype of the model's token table; the host does not wait.

    Args:
        embeds: [..., hidden] DeviceRows, an array or a tensor.
        table: [vocab, hidden].
    """
    import torch

    device = table.device
    if not isinstance(embeds, DeviceRows):
        given = embeds if isinstance(embeds, torch.Tensor) else upload(embeds, device)
        return given.to(device, table.dtype)
    token_ids = np.where(embeds.source_of == TOKENS, embeds.row_of, 0)
    gathered = torch.nn.functional.embedding(upload(token_ids, device), table)
    for place, source in enumerate(embeds.sources):
        [positions] = np.nonzero(embeds.source_of == place)
        if len(positions):
            rows = _pick(source, embeds.row_of[positions], device)
            gathered.index_copy_(0, upload(positions, device), rows.to(table.dtype))
    return gathered


def _pick(source: Any, row_of: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Some rows of a source, on the device."""
    import torch

    if isinstance(source, np.ndarray):
        return upload(source.reshape(-1, source.shape[-1])[row_of], device)
    rows = _tensor_of(source)
    if rows.is_cuda:
        # It was computed on another stream, and its memory must not serve anything new before this has read it.
        rows.record_stream(torch.cuda.current_stream(rows.device))
    return rows.flatten(0, -2)[upload(row_of, rows.device)].to(device)


def _tensor_of(source: Any) -> torch.Tensor:
    """The memory of a source as a tensor, without a copy."""
    import torch
    from torch.utils.dlpack import from_dlpack

    if isinstance(source, torch.Tensor):
        return source
    if not isinstance(source, View):
        return from_dlpack(source)
    if isinstance(source.owner, torch.Tensor):
        return source.owner
    # What TensorRT wrote is owned as bytes.
    return from_dlpack(source.owner).flatten().view(torch_dtype(source.dtype)).reshape(source.shape)
