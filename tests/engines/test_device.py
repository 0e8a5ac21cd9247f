"""Memory of a device and runs on it, in host memory; on a GPU under the marker `gpu`."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch

from hivtp.engines import device as device_module
from hivtp.engines.bundle import Bundle
from hivtp.engines.device import DeviceContext, device_errors, open_device
from hivtp_ops.errors import EngineError, OutOfMemoryError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


@pytest.fixture
def device() -> DeviceContext:
    return DeviceContext("cpu")


@pytest.fixture(scope="module")
def insert_file(half_bundle: Path) -> Path:
    return half_bundle / str(Bundle.open(half_bundle).manifest.language.decoder.insert_file)


def insert(device: DeviceContext, file: Path, rows: Any, *, waits: bool = True) -> np.ndarray:
    """Embeddings [4, 64] of zeros, with the first two rows of `rows` in the middle."""
    session = device.open_session(file)
    embeds = device.place(np.zeros((4, 64), np.float16))
    inserted = device.empty((4, 64), np.float16)
    inputs = {"embeds": embeds, "rows": device.place(rows), "row_of": np.array([-1, 0, 1, -1])}
    held = device.run(session, inputs, {"inserted": inserted}, waits=waits)
    array = device.read(inserted)
    del held
    return array


def test_a_run_reads_and_writes_memory_of_the_device(device, insert_file):
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    expected = np.zeros((4, 64), np.float16)
    expected[1:3] = rows[:2]
    for given in (
        rows,
        np.asfortranarray(rows),
        torch.from_numpy(rows),
        onnxruntime.OrtValue.ortvalue_from_numpy(rows),
    ):
        np.testing.assert_array_equal(insert(device, insert_file, given), expected)


def test_what_lies_on_the_device_is_not_copied(device):
    tensor = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    view = device.place(tensor)
    assert view.address == tensor.data_ptr()
    assert (view.shape, view.dtype, view.nbytes) == ((3, 2), np.float32, 24)
    assert device.place(view) is view


def test_rows_of_a_view_are_its_memory(device):
    array = np.arange(24, dtype=np.float16).reshape(4, 3, 2)
    view = device.place(array)
    part = view.rows(1, 3)
    assert (part.shape, part.nbytes, part.owner) == ((2, 3, 2), 24, view.owner)
    found = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint16 * 12).from_address(part.address)).view(np.float16)
    np.testing.assert_array_equal(found, array[1:3].ravel())
    assert part.reshape(-1, 2).shape == (6, 2)
    assert part.reshape(2, -1, 3).shape == (2, 2, 3)
    assert part.reshape(3, 4).address == part.address


def test_waits_are_counted(insert_file):
    rows = np.zeros((2, 64), np.float32)
    # Without a stream of their own, runs cannot follow one another without the host.
    for stream, waits, expected in ((None, True, 2), (None, False, 2), (4711, True, 2), (4711, False, 1)):
        device = DeviceContext("cpu", stream)
        insert(device, insert_file, rows, waits=waits)
        assert device.num_waits == expected


@pytest.mark.parametrize(
    "words",
    [
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1048576",
        "Available memory of 1024 is smaller than requested bytes of 2048",
        "CUDA failure 2: out of memory ; GPU=0",
    ],
)
def test_memory_that_runs_out_is_an_error_that_says_what_to_do(words):
    pattern = r"ran out while decoding.*fewer or smaller images.*int4-fp16"
    with pytest.raises(OutOfMemoryError, match=pattern), device_errors("decoding"):
        raise RuntimeError(words)


def test_any_other_failure_is_an_engine_error(device, insert_file):
    with pytest.raises(EngineError, match="onnxruntime failed while running the decoder"):
        insert(device, insert_file, np.zeros((3, 63), np.float32))
    with pytest.raises(MemoryError), device_errors("decoding"):
        raise MemoryError


def test_the_sessions_of_a_gpu_share_a_stream_where_cuda_core_can_make_one(monkeypatch):
    made = []

    class CudaDevice:
        def __init__(self, number: int) -> None:
            self.number = number

        def set_current(self) -> None:
            made.append(self.number)

        def create_stream(self) -> SimpleNamespace:
            return SimpleNamespace(handle=4711)

    core = ModuleType("cuda.core")
    core.Device = CudaDevice
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(device_module, "_streams", [])
    opened = []
    monkeypatch.setattr(
        device_module, "open_bound_session", lambda _file, _settings, device, stream: opened.append((device, stream))
    )
    device = open_device("cuda")
    for _ in range(2):
        device.open_session("decoder.onnx")
    assert opened == [("cuda", 4711)] * 2
    assert made == [0]
    assert len(device_module._streams) == 1
    monkeypatch.setattr(CudaDevice, "create_stream", lambda _self: 1 / 0)
    assert not open_device("cuda").has_stream


def test_without_cuda_core_every_session_has_its_own_stream(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    device = open_device("cuda")
    monkeypatch.setattr(device_module, "open_bound_session", lambda _file, _settings, device, stream: (device, stream))
    assert device.open_session("decoder.onnx") == ("cuda", None)


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
def test_a_gpu_gives_what_the_host_gives(insert_file, waits):
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    device = open_device("cuda")
    expected = insert(DeviceContext("cpu"), insert_file, rows)
    np.testing.assert_array_equal(insert(device, insert_file, rows), expected)
    np.testing.assert_array_equal(insert(device, insert_file, torch.from_numpy(rows).cuda(), waits=True), expected)
    if waits:
        assert device.place(rows).owner.device_name() == "cuda"
