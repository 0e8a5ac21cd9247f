"""Where the decoder runs and what it keeps lies: the memory of a GPU, or the host's in its place.

Written from ONNX Runtime's documentation and source; on a GPU it has not run yet.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.onnxruntime_cuda import open_bound_session, place, view_of
from hivtp.engines.view import View
from hivtp_ops.errors import EngineError, HivtpError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

    from hivtp.engines.base import Device, EngineSettings

# What onnxruntime says where memory ran out: its arena, its arena under gpu_mem_limit, CUDA.
_MEMORY_RAN_OUT = ("failed to allocate memory", "is smaller than requested bytes", "out of memory")


class DeviceContext:
    """Opens sessions on one device, and gives them memory of it.

    Args:
        device: "cuda"; or "cpu": the same path in host memory.
        stream: address of the CUDA stream on which all sessions run, so that one run can follow another without the
            host between them; None leaves each session its own, and every run then ends with a synchronisation.

    Attributes:
        num_waits: how often the host waited for the device.
    """

    def __init__(self, device: Device, stream: int | None = None) -> None:
        self.device = device
        self.num_waits = 0
        self._stream = stream

    @property
    def has_stream(self) -> bool:
        """Whether all sessions share a stream."""
        return self._stream is not None

    def open_session(self, file: Path, settings: EngineSettings | None = None) -> Any:
        """Open a graph; see `open_bound_session` for the errors."""
        with device_errors(f"loading {file}"):
            return open_bound_session(file, settings, self.device, self._stream)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> View:
        """Memory that nothing was written to.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        from onnxruntime import OrtValue

        with device_errors("allocating memory"):
            value = OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)
        return View(value, shape, dtype, value.data_ptr())

    def place(self, values: Any) -> View:
        """An array of the host, copied to the device; or what lies there (`__dlpack__`), without a copy."""
        if isinstance(values, View):
            return values
        with device_errors("copying to the device"):
            return view_of(place(values, self.device))

    def run(
        self,
        session: Any,
        inputs: Mapping[str, View | NDArray[Any]],
        outputs: Mapping[str, View | NDArray[Any]],
        *,
        waits: bool = True,
    ) -> Run:
        """Run a graph from memory to memory.

        Args:
            session: from `open_session`.
            inputs: each in the graph's shape and dtype.
            outputs: each where it is to be written. Memory of the host (an array) is written when this returns.
            waits: False lets the work go on after this returns, where all sessions share a stream; the result must
                then be held until a later run has waited.

        Returns:
            The run, which holds all the memory that it uses.

        Raises:
            EngineError: onnxruntime failed.
            OutOfMemoryError: the memory of the device ran out.
        """
        from onnxruntime import RunOptions

        waits = waits or not self.has_stream
        options = RunOptions()
        if not waits:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with device_errors("running the decoder"):
            binding = session.io_binding()
            for name, value in inputs.items():
                if isinstance(value, View):
                    binding.bind_input(name, self.device, 0, value.dtype.type, list(value.shape), value.address)
                else:
                    binding.bind_cpu_input(name, value)
            for name, value in outputs.items():
                place, address = (self.device, value.address) if isinstance(value, View) else ("cpu", value.ctypes.data)
                binding.bind_output(name, place, 0, value.dtype.type, list(value.shape), address)
            session.run_with_iobinding(binding, options)
        self.num_waits += waits
        return Run(binding, [*inputs.values(), *outputs.values()])

    def read(self, value: View) -> NDArray[Any]:
        """A copy of an OrtValue's whole memory on the host."""
        self.num_waits += 1
        with device_errors("copying from the device"):
            array: NDArray[Any] = value.owner.numpy()
        return array


class Run:
    """What a run uses, held as long as this is."""

    def __init__(self, binding: Any, values: Sequence[Any]) -> None:
        self._binding = binding
        self._values = values


@contextlib.contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Turn what onnxruntime raises into errors that say what to do.

    Raises:
        OutOfMemoryError: the memory of the device ran out.
        EngineError: any other failure.
    """
    try:
        yield
    except (HivtpError, MemoryError):
        raise
    except Exception as error:
        if any(words in str(error).lower() for words in _MEMORY_RAN_OUT):
            raise OutOfMemoryError(
                f"the memory of the device ran out while {doing} ({error}); give fewer or smaller images, ask for "
                "fewer requests or tokens at once, or export the decoder with --language-precision int4-fp16"
            ) from error
        raise EngineError(f"onnxruntime failed while {doing}: {error}") from error


def open_device(device: Device) -> DeviceContext:
    """A device whose sessions share one stream, where cuda-core is there to make it."""
    return DeviceContext(device, _new_stream() if device == "cuda" else None)


def _new_stream() -> int | None:
    try:
        from cuda.core import Device as CudaDevice
    except ImportError:
        return None
    try:
        gpu = CudaDevice(0)
        gpu.set_current()
        stream = gpu.create_stream()
    except Exception:  # noqa: BLE001  runs are right without it, and what is wrong with the GPU, the sessions will say
        return None
    # It serves until the process ends: sessions hold its address alone.
    _streams.append(stream)
    return int(stream.handle)


_streams: list[Any] = []
