"""The bundle, and the engines that run one graph of it."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Literal, get_args

from hivtp.engines.base import Engine, EngineSettings
from hivtp_ops.errors import EngineError, EngineWarning, HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.engines.onnxruntime import OnnxRuntimeEngine
    from hivtp.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

__all__ = ["Engine", "EngineName", "EngineSettings", "create_engine", "open_vision_engine"]

# onnxruntime for Linux otherwise reports to Microsoft how it is used, and keeps a database in the user's home. It reads
# this when it is imported; whoever wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

EngineName = Literal["auto", "onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]


def create_engine(
    name: str, file: Path, settings: EngineSettings | None = None
) -> OnnxRuntimeEngine | OnnxRuntimeCudaEngine:
    """Open a graph in an engine that runs ONNX.

    Args:
        name: "onnxruntime" on the CPU, "onnxruntime-cuda" on a GPU.
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
    raise EngineError(f"no engine is named {name!r} that runs ONNX; there are onnxruntime and onnxruntime-cuda")


def open_vision_engine(
    bundle: Bundle, name: str = "auto", settings: EngineSettings | None = None, *, trust_plans: bool = False
) -> Engine:
    """Open the vision graph of a bundle.

    Args:
        bundle: an opened bundle.
        name: one of EngineName. "auto" takes the first that works: a plan of the bundle for TensorRT, one for
            TensorRT for RTX, ONNX Runtime on a GPU where it is built for one, ONNX Runtime on the CPU. An EngineWarning
            says why one that is there was passed over. OpenVINO is taken where it is named: in bfloat16, which it
            prefers, its embeddings are not those of the other engines to the last digits.
        settings: how to run it.
        trust_plans: also load a plan that came with the bundle. A plan is code that runs in this process; without
            this, only one that this machine built is loaded, by a record in the user's state folder
            (`~/.local/state/hivtp/plans`), which no bundle can bring along.

    Raises:
        BundleError: the graph is not the one that the manifest describes.
        EngineError: there is no such engine, or it cannot run the graph here, and why.
        MissingExtraError: the engine's package is not installed.
    """
    if name not in get_args(EngineName):
        raise EngineError(f"no engine is named {name!r}; there are {', '.join(get_args(EngineName))}")
    settings = settings or EngineSettings()
    if name != "auto":
        return _CREATORS[name](bundle, settings, trust_plans)
    candidates = (candidate for candidate in _AUTO if _is_there(bundle, candidate))
    candidate = next(candidates)
    while True:
        try:
            return _CREATORS[candidate](bundle, settings, trust_plans)
        except HivtpError as error:
            following = next(candidates, None)
            if following is None:
                raise
            message = f"the engine {candidate} cannot run {bundle.folder}, trying {following}: {error}"
            warnings.warn(message, EngineWarning, stacklevel=2)
            candidate = following


def _is_there(bundle: Bundle, name: str) -> bool:
    """Whether an engine is worth trying: there is a plan for it, or its package, and it suits the graph's precision."""
    if name in ("tensorrt", "tensorrt-rtx"):
        from hivtp.engines.tensorrt.plan import has_plans

        return has_plans(bundle, name)
    if name == "onnxruntime-cuda":
        from hivtp.engines.onnxruntime_cuda import has_cuda_provider

        # The operators of an int8 graph are made for the CPU.
        return bundle.manifest.vision.precision != "int8" and has_cuda_provider()
    return True


def _open_plan(library: Literal["tensorrt", "tensorrt-rtx"]) -> Callable[[Bundle, EngineSettings, bool], Engine]:
    def create(bundle: Bundle, settings: EngineSettings, trust_plans: bool) -> Engine:
        from hivtp.engines.tensorrt.session import TensorRtEngine

        return TensorRtEngine.open(bundle, library, settings, trust_plans=trust_plans)

    return create


def _open_graph(name: str) -> Callable[[Bundle, EngineSettings, bool], Engine]:
    def create(bundle: Bundle, settings: EngineSettings, _trust_plans: bool) -> Engine:
        from hivtp.engines.signature import check_session, vision_tensors

        engine = create_engine(name, bundle.vision_file, settings)
        if bundle.manifest.vision.graph == "vision":
            check_session(engine.session, bundle.vision_file, *vision_tensors(bundle.manifest))
        if bundle.manifest.vision.precision == "fp8":
            warnings.warn(
                f"{name} rounds to fp8 as the vision graph says, and multiplies in a wider type, which is slower than "
                f"an fp16 graph: build a plan with hivtp plan {bundle.folder} --engine tensorrt, or export with "
                "--vision-precision fp16",
                EngineWarning,
                stacklevel=3,
            )
        return engine

    return create


def _open_openvino(bundle: Bundle, settings: EngineSettings, _trust_plans: bool) -> Engine:
    from hivtp.engines.openvino.vision import OpenVinoEngine

    return OpenVinoEngine(bundle, settings)


# Each creator imports what it needs when it is called.
_CREATORS: dict[str, Callable[[Bundle, EngineSettings, bool], Engine]] = {
    "tensorrt": _open_plan("tensorrt"),
    "tensorrt-rtx": _open_plan("tensorrt-rtx"),
    "onnxruntime-cuda": _open_graph("onnxruntime-cuda"),
    "onnxruntime": _open_graph("onnxruntime"),
    "openvino": _open_openvino,
}
_AUTO = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime")
