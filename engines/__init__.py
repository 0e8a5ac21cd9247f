"""The bundle, and the engines that run one graph of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, get_args

from hivtp.engines.base import Engine, EngineSettings
from hivtp_ops.errors import EngineError, EngineWarning, HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.engines.base import Device
    from hivtp.engines.bundle import Bundle

__all__ = ["Engine", "EngineName", "EngineSettings", "cpu_engine", "create_engine", "open_vision_engine"]

EngineName = Literal["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "torch", "torch-cuda"]

_TORCH_DEVICES: dict[str, Device] = {"torch": "cpu", "torch-cuda": "cuda"}


def create_engine(name: str, file: Path, settings: EngineSettings | None = None) -> Engine:
    """Open a graph in an engine that runs ONNX.

    Args:
        name: "onnxruntime" and "torch" on the CPU, "onnxruntime-cuda" and "torch-cuda" on a GPU.
        file: the graph.
        settings: how to run it.

    Raises:
        EngineError: there is no such engine, or it cannot load the file.
        MissingExtraError: the engine's package is not installed.
    """
    if name == "onnxruntime":
        from hivtp.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, settings)
    if name == "onnxruntime-cuda":
        from hivtp.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(file, settings)
    if name in _TORCH_DEVICES:
        from hivtp.engines.torch.session import TorchEngine

        return TorchEngine(file, settings or EngineSettings(), _TORCH_DEVICES[name])
    raise EngineError(f"no engine is named {name!r}; there are onnxruntime, onnxruntime-cuda, torch and torch-cuda")


def cpu_engine(precision: str) -> Literal["onnxruntime", "torch"]:
    """The engine that runs a vision graph of a precision on the CPU: ONNX Runtime has no kernels for bfloat16 there."""
    return "torch" if precision == "bf16" else "onnxruntime"


def open_vision_engine(bundle: Bundle, name: str = "auto", settings: EngineSettings | None = None) -> Engine:
    """Open the vision graph of a bundle.

    Args:
        bundle: an opened bundle.
        name: one of EngineName. "auto" takes the first that works: a plan of the bundle for TensorRT, one for
            TensorRT for RTX, ONNX Runtime on a GPU where it is built for one, ONNX Runtime on the CPU. An EngineWarning
            says why one that is there was passed over. It takes torch, which is slow to import, for a bf16 graph
            alone, on a GPU if there is one, in place of ONNX Runtime on the CPU.
        settings: how to run it.

    Raises:
        EngineError: there is no such engine, or it cannot run the graph here, and why.
        MissingExtraError: the engine's package is not installed.
    """
    if name not in get_args(EngineName):
        raise EngineError(f"no engine is named {name!r}; there are {', '.join(get_args(EngineName))}")
    settings = settings or EngineSettings()
    if settings.is_compiled and name not in _TORCH_DEVICES:
        raise EngineError(f"the engine {name} compiles nothing: choose torch or torch-cuda, or no vision_compile")
    precision = bundle.manifest.vision.precision
    if name == "onnxruntime" and cpu_engine(precision) != name:
        raise EngineError(
            f"the vision graph of {bundle.folder} is {precision}, and ONNX Runtime has no kernels for bfloat16 on a "
            "CPU: take the engine torch (pip install 'hivtp[torch]') or one for a GPU, or export the bundle with "
            "--vision-precision fp32 or fp16"
        )
    if name != "auto":
        return _CREATORS[name](bundle, settings)
    # One after the other: to look for what comes late may mean to import torch.
    candidates = (candidate for candidate in _AUTO if _is_there(bundle, candidate))
    candidate = next(candidates)
    while True:
        try:
            return _CREATORS[candidate](bundle, settings)
        except HivtpError as error:
            following = next(candidates, None)
            if following is None:
                raise
            message = f"the engine {candidate} cannot run {bundle.folder}, trying {following}: {error}"
            warnings.warn(message, EngineWarning, stacklevel=2)
            candidate = following


def _is_there(bundle: Bundle, name: str) -> bool:
    """Whether something speaks for an engine: a plan in the bundle, a package for GPUs, the graph's precision."""
    precision = bundle.manifest.vision.precision
    if name in ("tensorrt", "tensorrt-rtx"):
        from hivtp.engines.tensorrt.plan import has_plans

        return has_plans(bundle, name)
    if name == "onnxruntime-cuda":
        from hivtp.engines.onnxruntime_cuda import has_cuda_provider

        # The operators of an int8 graph are made for the CPU.
        return precision != "int8" and has_cuda_provider()
    if name == "torch-cuda":
        from hivtp.engines.torch.session import has_cuda

        # To look for CUDA means to import torch.
        return cpu_engine(precision) == "torch" and has_cuda()
    return name == cpu_engine(precision)


def _open_plan(library: Literal["tensorrt", "tensorrt-rtx"]) -> Callable[[Bundle, EngineSettings], Engine]:
    def create(bundle: Bundle, settings: EngineSettings) -> Engine:
        from hivtp.engines.tensorrt.session import TensorRtEngine

        return TensorRtEngine.open(bundle, library, settings)

    return create


def _open_graph(name: str) -> Callable[[Bundle, EngineSettings], Engine]:
    def create(bundle: Bundle, settings: EngineSettings) -> Engine:
        engine = create_engine(name, bundle.vision_file, settings)
        if bundle.manifest.vision.precision == "fp8":
            warnings.warn(
                f"{name} rounds what the vision graph has in fp8, and multiplies it in a wider type, which is slower "
                f"than an fp16 graph: build a plan with hivtp-export engine {bundle.folder} --engine tensorrt, or "
                "export with --vision-precision fp16",
                EngineWarning,
                stacklevel=3,
            )
        return engine

    return create


# What a creator needs is imported when it is called.
_CREATORS: dict[str, Callable[[Bundle, EngineSettings], Engine]] = {
    "tensorrt": _open_plan("tensorrt"),
    "tensorrt-rtx": _open_plan("tensorrt-rtx"),
    "onnxruntime-cuda": _open_graph("onnxruntime-cuda"),
    "onnxruntime": _open_graph("onnxruntime"),
    "torch": _open_graph("torch"),
    "torch-cuda": _open_graph("torch-cuda"),
}
_AUTO = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "torch-cuda", "onnxruntime", "torch")
