"""Stand-ins for cuda-core and a TensorRT library, in host memory: what session.py does with them can be run anywhere.

They follow the documented interfaces as far as session.py uses them. That the real ones are like this is for the
tests marked `gpu`.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.tensorrt.library import Library

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


class Buffer:
    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = (ctypes.c_byte * size)()
        self.handle = ctypes.addressof(self.memory)

    def copy_from(self, source: Buffer, *, stream: Any) -> None:
        assert self.size == source.size
        stream.do(lambda: ctypes.memmove(self.handle, source.handle, self.size))

    def copy_to(self, target: Buffer, *, stream: Any) -> None:
        target.copy_from(self, stream=stream)


class Stream:
    """Work waits until `sync`, as on a GPU: what is read too early is wrong here too."""

    handle = 4711

    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: list[Callable[[], object]] = []
        self.recorder: list[Callable[[], object]] | None = None

    def do(self, work: Callable[[], object]) -> None:
        (self.work if self.recorder is None else self.recorder).append(work)

    def sync(self) -> None:
        assert self.recorder is None, "a stream that is captured cannot be waited for"
        for work in self.work:
            work()
        self.work = []

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self)


class GraphBuilder:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.recorded: list[Callable[[], object]] = []

    def begin_building(self) -> GraphBuilder:
        self.stream.recorder = self.recorded
        return self

    def do(self, work: Callable[[], object]) -> None:
        self.stream.do(work)

    def end_building(self) -> GraphBuilder:
        self.stream.recorder = None
        return self

    def complete(self) -> GraphBuilder:
        return self

    def launch(self, stream: Stream) -> None:
        stream.work += self.recorded


class Device:
    name = "NVIDIA Fake"
    compute_capability = (9, 0)
    streams: tuple[Stream, ...] = ()

    def __init__(self, _index: int) -> None:
        pass

    def set_current(self) -> None:
        pass

    def create_stream(self) -> Stream:
        stream = Stream(self)
        Device.streams = (*Device.streams, stream)
        return stream

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        assert stream.recorder is None
        return Buffer(size)


class PinnedMemory:
    def allocate(self, size: int) -> Buffer:
        return Buffer(size)


def install(monkeypatch: pytest.MonkeyPatch, *, has_driver: bool = True) -> None:
    """Put a fake cuda.core where Python looks for it."""

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("no driver")

    core = ModuleType("cuda.core")
    core.Device = Device if has_driver else refuse
    core.LegacyPinnedMemoryResource = PinnedMemory
    core.system = SimpleNamespace(
        get_kernel_mode_driver_version=lambda: (580, 65, 6), get_user_mode_driver_version=lambda: (13, 0)
    )
    package = ModuleType("cuda")
    package.core = core
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.core", core)


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


# `x` [tiles, 3] float32 to `double` [tiles, 3] float32 and `number` [tiles] int64, the number of tiles.
TENSORS = {
    "x": (Mode.INPUT, np.float32, (-1, 3)),
    "double": (Mode.OUTPUT, np.float32, (-1, 3)),
    "number": (Mode.OUTPUT, np.int64, (-1,)),
}


class Context:
    def __init__(self) -> None:
        self.active_optimization_profile = 0
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.num_runs = 0
        self.fails = False

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "x"
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        if self.fails:
            return False
        assert handle == Stream.handle
        assert set(self.addresses) == set(TENSORS)
        addresses, shape = dict(self.addresses), self.shape

        def work() -> None:
            x, double = (_array(addresses[name], np.float32, shape) for name in ("x", "double"))
            double[:] = 2 * x
            _array(addresses["number"], np.int64, shape[:1])[:] = shape[0]

        Device.streams[-1].do(work)
        self.num_runs += 1
        return True


def _array(address: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(dtype)
    memory = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    num_io_tensors = len(TENSORS)

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    def create_execution_context(self) -> Context:
        self.contexts.append(Context())
        return self.contexts[-1]

    def get_tensor_name(self, index: int) -> str:
        return list(TENSORS)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return TENSORS[name][0]

    def get_tensor_dtype(self, name: str) -> type:
        return TENSORS[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return TENSORS[name][2]


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        if content == b"refused":
            self.logger.append("the header is wrong")
            return None
        return Engine()


def library(name: str = "tensorrt", version: str = "11.4.0.106", *, is_portable: bool = False) -> Library:
    """A library whose engines double their input; its logger is its list of messages."""
    module = SimpleNamespace(Runtime=Runtime, TensorIOMode=Mode, nptype=lambda dtype: dtype)
    if is_portable:
        module.ComputeCapability = object()
    messages: deque[str] = deque(maxlen=5)
    return Library(name, version, module, messages, messages)
