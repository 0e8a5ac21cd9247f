"""Embeddings gathered as a tensor, from wherever they lie."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from hivtp.engines.onnxruntime_cuda import view_of
from hivtp.engines.view import View
from hivtp.runtime.device_rows import DeviceRows, concatenate
from hivtp.runtime.language.torch_rows import gather


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((50, 8), generator=torch.Generator().manual_seed(0)).to(device, dtype)


def rows(num_tiles: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_tiles, 5, 8)).astype(np.float32)


class Bytes:
    """Memory as TensorRT's is owned: bytes that `__dlpack__` gives out."""

    def __init__(self, array: np.ndarray) -> None:
        self.tensor = torch.from_numpy(array.view(np.uint8).ravel())

    def __dlpack__(self, **settings: object) -> object:
        return self.tensor.__dlpack__(**settings)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def sources(array: np.ndarray) -> dict[str, object]:
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    tensor, owner = torch.from_numpy(array.copy()), Bytes(array)
    frozen = array.copy()
    frozen.flags.writeable = False
    return {
        "an array": frozen,
        "a tensor": tensor,
        "an OrtValue": value,
        "a view of an OrtValue": view_of(value),
        "a view of a tensor": View(tensor, array.shape, array.dtype, tensor.data_ptr()),
        "a view of bytes": View(owner, array.shape, array.dtype, owner.tensor.data_ptr()),
    }


@pytest.mark.parametrize("kind", sources(rows()))
def test_rows_of_any_memory_come_between_those_of_tokens(kind: str, recwarn) -> None:
    source = sources(rows())[kind]
    picture = DeviceRows.of_source(source, 5, start=5)[np.array([0, 3, 4])]
    embeds = concatenate([DeviceRows.of_tokens([7, 0]), picture, DeviceRows.of_tokens([49])])
    found = gather(embeds, table())
    expected = torch.cat([table()[[7, 0]], torch.from_numpy(rows())[1, [0, 3, 4]], table()[[49]]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not recwarn.list


def test_two_sources_and_the_dtype_of_the_model() -> None:
    first, second = rows(), rows(1)[0]
    embeds = concatenate([DeviceRows.of_source(torch.from_numpy(first), 10), second, DeviceRows.of_tokens([1])])
    found = gather(embeds, table(dtype=torch.bfloat16))
    expected = torch.cat([torch.from_numpy(first).flatten(0, 1), torch.from_numpy(second), table()[[1]]])
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("embeds", [rows()[0], torch.from_numpy(rows()[0])], ids=["array", "tensor"])
def test_arrays_and_tensors_are_taken_as_they_are(embeds: np.ndarray | torch.Tensor) -> None:
    found = gather(embeds, table(dtype=torch.float16))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.from_numpy(rows()[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    source = torch.from_numpy(rows()).cuda()
    embeds = concatenate([DeviceRows.of_tokens([7, 0]), DeviceRows.of_source(source, 10), DeviceRows.of_tokens([49])])
    on_gpu = table("cuda")
    gather(embeds, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gather(embeds, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.cat([table()[[7, 0]], torch.from_numpy(rows()).flatten(0, 1), table()[[49]]])
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)
