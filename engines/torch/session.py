"""Runs a vision graph in PyTorch. On the CPU it is tested; on a GPU it has not run yet."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hivtp.engines.inputs import InputType, check_inputs
from hivtp.engines.torch.errors import compiled_runs, require_packages, torch_errors
from hivtp.engines.torch.memory import pinned, to_host, upload
from hivtp.engines.view import View
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np
    import torch

    from hivtp.engines.base import Arrays, Device, EngineSettings

    Tensors = Mapping[str, torch.Tensor]

PART = "vision graph"
# What torch puts off until it runs must not be captured.
NUM_RUNS_BEFORE_CAPTURE = 2


class TorchEngine:
    """One graph in PyTorch; on a GPU on a stream of its own.

    Args:
        file: the .onnx file; its weights lie beside it.
        settings: how to run it. `num_threads` is torch's, and so that of the whole process.
        device: where.

    Raises:
        MissingExtraError: torch or onnx-ir is not installed.
        EngineError: torch has no CUDA here, or cannot run the graph.
        OutOfMemoryError: the weights do not fit into the memory of the device.
    """

    max_tiles: int | None = None

    def __init__(self, file: Path, settings: EngineSettings, device: Device) -> None:
        require_packages("torch", "onnx_ir", extra="torch")
        import torch

        from hivtp.engines.torch.graph import load_graph

        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"torch {torch.__version__} has no usable CUDA device here, so it cannot run {file} on a GPU: check "
                "nvidia-smi and that torch was built for CUDA, or take the engine torch, on the CPU"
            )
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self.view_device: Device = device
        self._device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        model, module = load_graph(file)
        with torch_errors(self._device, PART):
            module = module.to(self._device).eval().requires_grad_(False)
        self._inputs = dict(map(_describe, model.graph.inputs))
        self.output_names = tuple(map(_name, model.graph.outputs))
        self._is_compiled = settings.is_compiled
        self._function: Callable[..., Tensors] = module
        if settings.is_compiled:
            with self._errors():
                self._function = torch.compile(module, fullgraph=True, dynamic=False)
        self._captures = settings.uses_cuda_graph and device == "cuda"
        self._captured: dict[int, _Captured] = {}
        self._stream = torch.cuda.Stream(self._device) if device == "cuda" else None  # type: ignore[no-untyped-call]
        # Captured runs share buffers, and torch compiles in one thread at a time.
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        return self._run(inputs, None)[1]

    def run_keeping(self, inputs: Arrays, kept: str) -> tuple[View, dict[str, np.ndarray[Any, Any]]]:
        """See DeviceEngine.run_keeping; the owner of the view is a tensor."""
        tensor, outputs = self._run(inputs, kept)
        assert tensor is not None, "it was kept"
        return View(tensor, tuple(tensor.shape), _dtype(tensor), tensor.data_ptr()), outputs

    def _run(self, inputs: Arrays, kept: str | None) -> tuple[torch.Tensor | None, dict[str, np.ndarray[Any, Any]]]:
        import torch

        num_tiles = self._check(inputs)
        with self._lock, self._errors(), torch.no_grad(), torch.cuda.stream(self._stream):
            outputs = dict(self._compute(inputs, num_tiles))
            tensor = outputs.pop(kept) if kept is not None else None
            if tensor is not None and self._captures:
                # The next run writes to the same memory.
                tensor = tensor.clone()
            on_host = {name: to_host(output) for name, output in outputs.items()}
            if self._stream is not None:
                self._stream.synchronize()
        return tensor, {name: output.numpy() for name, output in on_host.items()}

    def _compute(self, inputs: Arrays, num_tiles: int) -> Tensors:
        """Enqueue a run, and its outputs on the device."""
        if not self._captures:
            return self._function(*(upload(inputs[name], self._device) for name in self._inputs))
        if num_tiles not in self._captured:
            tensors = [upload(inputs[name], self._device) for name in self._inputs]
            self._captured[num_tiles] = _Captured(self._function, tensors, self._stream)
        return self._captured[num_tiles]([inputs[name] for name in self._inputs])

    def _check(self, inputs: Arrays) -> int:
        """The number of tiles of inputs that fit."""
        numbers = check_inputs(inputs, self._inputs, "graph")
        if len(numbers) != 1 or 0 in numbers:
            raise EngineError(f"the inputs have {sorted(numbers)} tiles; all must have the same number, 1 or more")
        return numbers.pop()

    def _errors(self) -> AbstractContextManager[None]:
        if self._is_compiled:
            return compiled_runs(self._device, PART, "vision_compile")
        return torch_errors(self._device, PART)


class _Captured:
    """One number of tiles as a CUDA graph over buffers that stay.

    Args:
        function: what is captured.
        inputs: the buffers of its inputs.
        stream: captures and replays it.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: list[torch.Tensor], stream: Any) -> None:
        import torch

        self._inputs = inputs
        for _ in range(NUM_RUNS_BEFORE_CAPTURE):
            function(*inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be decoding meanwhile, and allocate.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = function(*inputs)

    def __call__(self, arrays: list[np.ndarray[Any, Any]]) -> Tensors:
        for buffer, array in zip(self._inputs, arrays, strict=True):
            buffer.copy_(pinned(array), non_blocking=True)
        self._graph.replay()
        return self._outputs


def has_cuda() -> bool:
    """Whether torch is installed and sees a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _name(value: Any) -> str:
    name: str = value.name
    return name


def _describe(value: Any) -> tuple[str, InputType]:
    return _name(value), (value.dtype.numpy(), tuple(int(length) for length in value.shape[1:]))


def _dtype(tensor: torch.Tensor) -> np.dtype[Any]:
    dtype: np.dtype[Any] = tensor.new_empty(0, device="cpu").numpy().dtype
    return dtype
