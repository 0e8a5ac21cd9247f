"""ONNX Runtime on a GPU. Written from the documentation, not yet run on one."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.base import Arrays, EngineSettings
from hivtp.engines.onnxruntime import open_session, run_errors
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime onnxruntime-gpu; pip install 'hivtp[cuda]'"


class OnnxRuntimeCudaEngine:
    """One graph in one session of the CUDA provider; arrays go up, and outputs come down.

    Args:
        file: the .onnx file; its weights lie beside it.
        settings: how to run it.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: the installed onnxruntime has no CUDA, or CUDA does not start, or it cannot load the file.
    """

    max_tiles: int | None = None
    description = "onnxruntime on a GPU"

    def __init__(self, file: Path, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        self.session = open_cuda_session(file, settings)
        self.output_names = tuple(output.name for output in self.session.get_outputs())
        self._uses_cuda_graph = settings.uses_cuda_graph
        self._recorded: dict[int, _RecordedRun] = {}
        # The buffers of a recorded run serve one caller at a time.
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        with run_errors("running the vision graph"):
            if not self._uses_cuda_graph:
                return dict(zip(self.output_names, self.session.run(None, dict(inputs)), strict=True))
            num_tiles = len(next(iter(inputs.values()), ()))
            with self._lock:
                if num_tiles not in self._recorded:
                    self._recorded[num_tiles] = _RecordedRun(self.session, inputs, num_tiles)
                return self._recorded[num_tiles](inputs)


class _RecordedRun:
    """One number of tiles, bound to buffers that stay, as a recorded CUDA graph needs it."""

    def __init__(self, session: Any, inputs: Arrays, num_tiles: int) -> None:
        from onnxruntime import OrtValue, RunOptions

        self._session = session
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        for name, array in inputs.items():
            value = self._inputs[name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
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
            self._inputs[name].update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: value.numpy() for name, value in self._outputs.items()}


def open_cuda_session(file: Path, settings: EngineSettings | None = None) -> Any:
    """Open an `onnxruntime.InferenceSession` on the first GPU.

    Args:
        file: the .onnx file.
        settings: how to run it; with `uses_cuda_graph` runs are recorded and replayed.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: the installed onnxruntime has no CUDA, or CUDA does not start, or it cannot load the file.
        OutOfMemoryError: the graph does not fit into the memory of the GPU.
    """
    check_cuda_package()
    options = {"device_id": "0"}
    if settings is not None and settings.uses_cuda_graph:
        options["enable_cuda_graph"] = "1"
    session = open_session(file, settings, stops_spinning=True, providers=[(PROVIDER, options), "CPUExecutionProvider"])
    # Where CUDA does not start, onnxruntime takes the CPU and goes on.
    if PROVIDER not in session.get_providers():
        raise EngineError(
            f"onnxruntime could not start CUDA for {file}: there is no usable GPU or driver, or libraries of CUDA "
            "are missing; check nvidia-smi, and install with: pip install 'hivtp[cuda]'"
        )
    return session


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
