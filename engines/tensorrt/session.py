"""Runs a plan on the GPU. Written from the documentation of TensorRT 11.4 and cuda-core 1.2, and not yet run on one."""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.gpu import find_gpu
from hivtp.engines.inputs import check_inputs
from hivtp.engines.tensorrt.library import Library, LibraryName, load_library
from hivtp.engines.tensorrt.plan import read_plan
from hivtp.engines.tensorrt.profile import find_profile, max_tiles
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from hivtp.engines.base import Arrays, EngineSettings
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.tensorrt.plan_record import PlanRecord


class TensorRtEngine:
    """One plan on one GPU, with a stream of its own.

    Args:
        library: built the plan.
        content: the plan, whose hash was checked.
        record: its sidecar.
        settings: how to run it.

    Raises:
        MissingExtraError: cuda-core is not installed.
        EngineError: the library refuses the plan.
    """

    def __init__(self, library: Library, content: bytes, record: PlanRecord, settings: EngineSettings) -> None:
        try:
            from cuda.core import Device
        except ImportError as error:
            raise MissingExtraError("cuda.core", library.name) from error
        self._library = library
        self.description = library.name
        self.record = record
        self._profiles = record.tile_profiles
        self._uses_cuda_graph = settings.uses_cuda_graph
        # Contexts are not for several threads at once, and neither are the buffers.
        self._lock = threading.Lock()
        self._device = Device(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        trt = library.module
        # The runtime must outlive its engine.
        self._runtime = trt.Runtime(library.logger)
        _check_validity(library, self._runtime, content)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise library.failure("cannot load the plan")
        self._context = self._new_context()
        self._tensors = [_describe(trt, self._engine, index) for index in range(self._engine.num_io_tensors)]
        # By the number of tiles.
        self._runs: dict[int, _Run] = {}
        self.output_names = tuple(tensor.name for tensor in self._tensors if not tensor.is_input)
        self.max_tiles: int | None = max_tiles(self._profiles)

    @classmethod
    def open(
        cls, bundle: Bundle, library_name: LibraryName, settings: EngineSettings, *, trust_plans: bool
    ) -> TensorRtEngine:
        """Open the plan of a bundle that fits this machine.

        Args:
            bundle: an opened bundle.
            library_name: which library runs it.
            settings: how to run it.
            trust_plans: also one that this machine did not build.

        Raises:
            EngineError: no plan can be used, and why; or the library refuses it.
            MissingExtraError: the library or cuda-core is not installed.
        """
        library = load_library(library_name)
        record, content = read_plan(bundle, library, find_gpu(library_name), trust_plans=trust_plans)
        return cls(library, content, record, settings)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        num_tiles = self._check(inputs)
        with self._lock:
            try:
                # CUDA knows the current device per thread.
                self._device.set_current()
                if num_tiles not in self._runs:
                    self._runs[num_tiles] = self._new_run(num_tiles)
                return self._runs[num_tiles](inputs)
            except EngineError:
                raise
            except Exception as error:
                raise EngineError(f"{self._library.name} failed on {num_tiles} tiles: {error}") from error

    def _check(self, inputs: Arrays) -> int:
        """The number of tiles of inputs that fit."""
        expected = {tensor.name: (tensor.dtype, tensor.tail) for tensor in self._tensors if tensor.is_input}
        numbers = check_inputs(inputs, expected, "plan")
        [num_tiles] = numbers if len(numbers) == 1 else [0]
        if find_profile(self._profiles, num_tiles) is None:
            raise EngineError(
                f"inputs of {sorted(numbers)} tiles do not fit a plan for {', '.join(map(str, self._profiles))} tiles; "
                "build it with other --tiles"
            )
        return num_tiles

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._library.failure("cannot make an execution context")
        return context

    def _new_run(self, num_tiles: int) -> _Run:
        profile = find_profile(self._profiles, num_tiles)
        assert profile is not None, "inputs are checked first"
        # A captured graph holds for as long as its context is left as it was, so each gets its own.
        context = self._new_context() if self._uses_cuda_graph else self._context
        return _Run(self._library, self._stream, context, self._tensors, num_tiles, profile, self._uses_cuda_graph)


@dataclass(frozen=True)
class _Tensor:
    """An input or output: its shape is the number of tiles, then `tail`."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    tail: tuple[int, ...]


class _Run:
    """The buffers for one number of tiles, on the GPU and pinned on the host; their addresses never change."""

    def __init__(
        self,
        library: Library,
        stream: Any,
        context: Any,
        tensors: list[_Tensor],
        num_tiles: int,
        profile: int,
        uses_cuda_graph: bool,
    ) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self._library, self._stream, self._context = library, stream, context
        self._tensors, self._num_tiles, self._profile = tensors, num_tiles, profile
        self._uses_cuda_graph = uses_cuda_graph
        self._graph: Any = None
        self._on_gpu: dict[str, Any] = {}
        self._pinned: dict[str, Any] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        for tensor in tensors:
            num_bytes = num_tiles * math.prod(tensor.tail) * tensor.dtype.itemsize
            self._on_gpu[tensor.name] = stream.device.allocate(num_bytes, stream=stream)
            pinned = self._pinned[tensor.name] = LegacyPinnedMemoryResource().allocate(num_bytes)
            memory = memoryview((ctypes.c_byte * num_bytes).from_address(int(pinned.handle)))
            self._arrays[tensor.name] = np.frombuffer(memory, tensor.dtype).reshape(num_tiles, *tensor.tail)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        for name, array in inputs.items():
            np.copyto(self._arrays[name], array)
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._prepare_context()
            self._enqueue(self._stream)
        self._stream.sync()
        # What TensorRT put off until the first run must not be captured, so the second is.
        if self._uses_cuda_graph and self._graph is None:
            self._graph = self._capture()
        return {name: self._arrays[name].copy() for name in self._outputs}

    @property
    def _outputs(self) -> list[str]:
        return [tensor.name for tensor in self._tensors if not tensor.is_input]

    def _prepare_context(self) -> None:
        context = self._context
        if context.active_optimization_profile != self._profile:
            self._demand(context.set_optimization_profile_async(self._profile, int(self._stream.handle)))
        for tensor in self._tensors:
            if tensor.is_input:
                self._demand(context.set_input_shape(tensor.name, (self._num_tiles, *tensor.tail)))
            self._demand(context.set_tensor_address(tensor.name, int(self._on_gpu[tensor.name].handle)))

    def _enqueue(self, stream: Any) -> None:
        handle = int(getattr(stream, "stream", stream).handle)
        for tensor in self._tensors:
            if tensor.is_input:
                self._on_gpu[tensor.name].copy_from(self._pinned[tensor.name], stream=stream)
        self._demand(self._context.execute_async_v3(handle))
        for name in self._outputs:
            self._on_gpu[name].copy_to(self._pinned[name], stream=stream)

    def _capture(self) -> Any:
        builder = self._stream.create_graph_builder().begin_building()
        self._enqueue(builder)
        return builder.end_building().complete()

    def _demand(self, is_done: bool) -> None:
        if not is_done:
            raise self._library.failure(f"cannot run {self._num_tiles} tiles")


def _describe(trt: Any, engine: Any, index: int) -> _Tensor:
    name = engine.get_tensor_name(index)
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
    return _Tensor(name, is_input, dtype, tuple(engine.get_tensor_shape(name))[1:])


def _check_validity(library: Library, runtime: Any, content: bytes) -> None:
    """Ask the library, where it can be asked, whether it could load a plan, and why not."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    trt = library.module
    validity, diagnostics = runtime.get_engine_validity(content)
    if validity == trt.EngineValidity.INVALID:
        kinds = trt.EngineInvalidityDiagnostics.__members__.items()
        reasons = [name.lower().replace("_", " ") for name, kind in kinds if int(diagnostics) & int(kind)]
        raise EngineError(f"{library.name} {library.version} cannot load the plan: {', '.join(reasons) or 'unknown'}")
