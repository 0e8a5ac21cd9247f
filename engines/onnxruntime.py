"""ONNX Runtime: runs a graph file on the CPU; onnxruntime_cuda.py runs it on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.engines.base import Arrays, EngineSettings
from hivtp.engines.failures import library_errors
from hivtp.engines.int8 import EXACT_PRODUCTS, overflows_int8
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np

# What onnxruntime says where memory ran out: its arena, its arena under gpu_mem_limit, CUDA, the C++ library.
_MEMORY_RAN_OUT = ("failed to allocate memory", "is smaller than requested bytes", "out of memory", "bad_alloc")
# How threads of a session wait for each other. By default an idle one spins for a millisecond, and each gets its share
# of a loop at once: with another process on one of two cores, a thread that has lost its core holds up all others,
# which keep the cores busy meanwhile, and a decode step took 2.7 to 3.3 times as long. With these 1.4 times (1.6 in
# float32), and on a quiet machine no longer than by default (0.95 and 0.96).
WAITING = {"session.intra_op.spin_duration_us": "10", "session.dynamic_block_base": "4"}


class OnnxRuntimeEngine:
    """One graph in one `onnxruntime.InferenceSession`.

    Args:
        file: the .onnx file; its weights lie beside it.
        settings: how to run it.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load the file.
    """

    max_tiles: int | None = None
    description = "onnxruntime"

    def __init__(self, file: Path, settings: EngineSettings | None = None) -> None:
        # Idle threads spin for the next run. The decoder's comes at once; after this graph's, the decoder runs, and
        # spinning threads would take its cores: measured, they cost the prefill a tenth.
        self.session = open_session(file, settings or EngineSettings(), stops_spinning=True)
        self.output_names = tuple(output.name for output in self.session.get_outputs())

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        with run_errors("running the vision graph"):
            outputs = self.session.run(None, dict(inputs))
        return dict(zip(self.output_names, outputs, strict=True))


def run_errors(doing: str) -> AbstractContextManager[None]:
    """Turn what onnxruntime raises into errors that say what to do.

    Args:
        doing: what failed, for the message.

    Raises:
        OutOfMemoryError: memory ran out, of the host or of a GPU.
        EngineError: any other failure.
    """
    return library_errors("onnxruntime", doing, _MEMORY_RAN_OUT)


def open_session(
    file: Path,
    settings: EngineSettings | None = None,
    *,
    stops_spinning: bool = False,
    providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
) -> Any:
    """Open an `onnxruntime.InferenceSession`.

    Args:
        file: the .onnx file.
        settings: how to run it.
        stops_spinning: let the session's threads rest as soon as a run ends.
        providers: what runs its nodes, the first that can.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    with run_errors(f"loading {file}"):
        options = session_options(settings)
        if stops_spinning:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(
            file,
            options,
            providers=list(providers),
            # It would print to standard output, and try providers that were not asked for.
            enable_fallback=0,
            # Else a graph may bring options along, where an environment variable says so.
            read_config_from_model=0,
        )


def session_options(settings: EngineSettings | None = None) -> Any:
    """The `onnxruntime.SessionOptions` of every session here; onnxruntime is installed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Nothing but what ends the process: other errors are raised.
    options.log_severity_level = 4
    # A memory pattern is planned anew for every shape of the inputs, and prompts differ. It also asks for all memory
    # a second time, so that the second run was as slow as the first, and gained nothing measurable after that.
    options.enable_mem_pattern = False
    if settings is not None and settings.num_threads is not None:
        options.intra_op_num_threads = settings.num_threads
    for entry, value in WAITING.items():
        options.add_session_config_entry(entry, value)
    if overflows_int8():
        # Of no effect where a graph has no products of 8 bits.
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return options
