"""OpenVINO as it is installed: what it can compute in here, how graphs are compiled, and its errors as ours."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Literal

from hivtp.engines.failures import library_errors
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hivtp.engines.base import EngineSettings, Precision

DEVICE = "CPU"
# What openvino says where memory ran out.
_MEMORY_RAN_OUT = ("bad_alloc", "out of memory", "could not allocate", "failed to allocate")
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
FloatType = Literal["float32", "bfloat16"]
# Threads that open engines at once would each open a core.
_OPENING = threading.Lock()


def load_openvino() -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino


def shared_core() -> Any:
    """The `openvino.Core` of this process, which lives as long as the process does.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    with _OPENING:
        return _core(load_openvino())


@functools.cache
def _core(openvino: Any) -> Any:
    # A core gives the thread that opens it a stack for signals, and frees it with itself. Of two cores the second frees
    # what the thread still uses, and so does one that another thread closes: the next Ctrl-C is a segmentation fault.
    return openvino.Core()


def resolve_precision(core: Any, precision: Precision) -> FloatType:
    """In which type products are computed.

    Args:
        core: an `openvino.Core`.
        precision: "auto" takes bfloat16 where OpenVINO does by itself: on processors with AVX512_BF16 or AMX.

    Raises:
        EngineError: bfloat16 is asked for, and this processor cannot.
    """
    if precision == "auto":
        hint = core.get_property(DEVICE, "INFERENCE_PRECISION_HINT")
        return "bfloat16" if hint.get_type_name() == "bf16" else "float32"
    if precision == "bfloat16" and "BF16" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
        raise EngineError("openvino cannot compute in bfloat16 on this processor; choose the precision auto or float32")
    return precision


def compile_graph(core: Any, model: Any, settings: EngineSettings, precision: FloatType) -> Any:
    """Compile a graph for the CPU.

    Args:
        core: an `openvino.Core`.
        model: an `openvino.Model`.
        settings: how to run it.
        precision: in which products are computed, and a paged KV cache is kept.

    Raises:
        EngineError: openvino cannot.
        OutOfMemoryError: memory ran out.
    """
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "KV_CACHE_PRECISION": _HINTS[precision],
        # A thread that may not leave its core waits there for whoever else runs on it: with a foreign core of load, a
        # decode step of 0.3 B took 1.64 times as long, without pinning 1.49, and on a quiet machine 0.94.
        "ENABLE_CPU_PINNING": False,
    }
    if settings.num_threads is not None:
        options["INFERENCE_NUM_THREADS"] = settings.num_threads
    with run_errors("compiling a graph"):
        return core.compile_model(model, DEVICE, options)


def run_errors(doing: str) -> AbstractContextManager[None]:
    """Turn what openvino raises into errors that say what to do.

    Args:
        doing: what failed, for the message.

    Raises:
        OutOfMemoryError: memory ran out.
        EngineError: any other failure.
    """
    return library_errors("openvino", doing, _MEMORY_RAN_OUT, _reason)


def _reason(error: Exception) -> str:
    """What it says, without the places in its source where it passed."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith("Exception from ")]
    return "; ".join(reasons) or type(error).__name__
