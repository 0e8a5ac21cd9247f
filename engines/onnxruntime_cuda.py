"""ONNX Runtime on a GPU: inputs and outputs bound to its memory. Written from the documentation, not yet run on one."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.base import Arrays, Device, EngineSettings
from hivtp.engines.onnxruntime import open_session
from hivtp.engines.view import View
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime onnxruntime-gpu; pip install 'hivtp[cuda]'"


class OnnxRuntimeCudaEngine:
    """One graph in one session of the CUDA provider.

    Args:
        file: the .onnx file; its weights lie beside it.
        settings: how to run it.
        device: "cpu" binds to memory of the host instead, with the CPU provider: the same path where there is no GPU.
        stream: address of the CUDA stream to run on; None makes one.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: the installed onnxruntime has no CUDA, or CUDA does not start, or it cannot load the file.
    """

    max_tiles: int | None = None

    def __init__(
        self,
        file: Path,
        settings: EngineSettings | None = None,
        *,
        device: Device = "cuda",
        stream: int | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        self.device = device
        self.uses_cuda_graph = settings.uses_cuda_graph and device == "cuda"
        # A recorded run writes to its own buffers again and again.
        self.view_device = None if self.uses_cuda_graph else device
        self.session = open_bound_session(
            file, settings, device, stream, uses_cuda_graph=self.uses_cuda_graph, stops_spinning=True
        )
        self.output_names = tuple(output.name for output in self.session.get_outputs())
        self._fixed: dict[int, _FixedRun] = {}
        # Fixed buffers serve one run at a time.
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        if not self.uses_cuda_graph:
            return {name: value.numpy() for name, value in self.run_on_device(inputs).items()}
        num_tiles = len(next(iter(inputs.values()), ()))
        with self._lock:
            try:
                if num_tiles not in self._fixed:
                    self._fixed[num_tiles] = _FixedRun(self.session, inputs, num_tiles)
                return self._fixed[num_tiles](inputs)
            except Exception as error:
                raise EngineError(f"onnxruntime failed: {error}") from error

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the graph and leave the outputs where they are.

        Args:
            inputs: for every input a numpy array, which is copied to the device, or what has `__dlpack__` there
                (a torch tensor, an output of another engine), which is not.

        Returns:
            Every output by name, an `onnxruntime.OrtValue`, which has `__dlpack__`: `torch.from_dlpack` takes it
            without a copy. It is finished when this returns.

        Raises:
            EngineError: the inputs do not fit, or the engine failed.
        """
        try:
            binding = self.session.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, place(value, self.device))
            for name in self.output_names:
                binding.bind_output(name, self.device)
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return dict(zip(self.output_names, binding.get_outputs(), strict=True))
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {error}") from error

    def run_keeping(self, inputs: Arrays, kept: str) -> tuple[View, dict[str, np.ndarray[Any, Any]]]:
        """See DeviceEngine.run_keeping."""
        outputs = self.run_on_device(inputs)
        view = view_of(outputs.pop(kept))
        return view, {name: value.numpy() for name, value in outputs.items()}


class _FixedRun:
    """One number of tiles, bound to buffers that stay, as a recorded CUDA graph needs it."""

    def __init__(self, session: Any, inputs: Arrays, num_tiles: int) -> None:
        from onnxruntime import OrtValue, RunOptions

        self._session = session
        self._inputs = {name: OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in inputs.items()}
        self._outputs = {}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            # The first dimension is the number of tiles, and the only one that varies.
            shape = [num_tiles, *output.shape[1:]]
            dtype = np.int64 if "int64" in output.type else np.float32
            value = self._outputs[output.name] = OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
            self._binding.bind_ortvalue_output(output.name, value)
        self._options = RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(num_tiles))

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        for name, array in inputs.items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: value.numpy() for name, value in self._outputs.items()}


def open_bound_session(
    file: Path,
    settings: EngineSettings | None,
    device: Device,
    stream: int | None = None,
    *,
    uses_cuda_graph: bool = False,
    stops_spinning: bool = False,
) -> Any:
    """Open an `onnxruntime.InferenceSession` whose inputs and outputs are bound to the memory of a device.

    Args:
        file: the .onnx file.
        settings: how to run it.
        device: see OnnxRuntimeCudaEngine.
        stream: likewise.
        uses_cuda_graph: record runs and replay them.
        stops_spinning: see open_session.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: the installed onnxruntime has no CUDA, or CUDA does not start, or it cannot load the file.
    """
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device == "cuda":
        check_cuda_package()
        providers.insert(0, (PROVIDER, _provider_options(uses_cuda_graph, stream)))
    session = open_session(file, settings, stops_spinning=stops_spinning, providers=providers)
    # Where CUDA does not start, onnxruntime takes the CPU and goes on.
    if device == "cuda" and PROVIDER not in session.get_providers():
        raise EngineError(
            f"onnxruntime could not start CUDA for {file}: there is no usable GPU or driver, or libraries of CUDA "
            "are missing; check nvidia-smi, and install with: pip install 'hivtp[cuda]'"
        )
    return session


def place(values: Any, device: Device) -> Any:
    """An array of the host, copied to a device; or what lies there (`__dlpack__`), without a copy: an `OrtValue`."""
    from onnxruntime import OrtValue

    if isinstance(values, np.ndarray):
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values), device, 0)
    return values if isinstance(values, OrtValue) else OrtValue.from_dlpack(values)


def view_of(value: Any) -> View:
    """The memory of an `onnxruntime.OrtValue`."""
    kind = value.data_type().removeprefix("tensor(").removesuffix(")")
    return View(value, value.shape(), {"float": "float32", "double": "float64"}.get(kind, kind), value.data_ptr())


def has_cuda_provider() -> bool:
    """Whether the installed onnxruntime, if any, was built for CUDA."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return PROVIDER in onnxruntime.get_available_providers()


def check_cuda_package() -> None:
    """Refuse an installation that cannot run on a GPU, and load the libraries of CUDA that came with pip.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it is not the one for GPUs, or both are installed and one has overwritten the other.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cuda") from error
    if PROVIDER not in onnxruntime.get_available_providers():
        if _is_installed("onnxruntime") and _is_installed("onnxruntime-gpu"):
            raise EngineError(
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other, and what is left has no "
                f"CUDA; install one alone: {INSTALL}"
            )
        raise EngineError(f"the installed onnxruntime is built for the CPU alone; replace it: {INSTALL}")
    onnxruntime.preload_dlls()


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _provider_options(uses_cuda_graph: bool, stream: int | None) -> dict[str, str]:
    options = {"device_id": "0"}
    if uses_cuda_graph:
        options["enable_cuda_graph"] = "1"
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    return options
