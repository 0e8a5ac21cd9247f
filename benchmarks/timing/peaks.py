"""The rates that a machine reaches in arithmetic and in memory, each by the plainest program that shows it."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import Results, System, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.timing.harness import Pass, Sample

NAME = "large products and copies"
# Rows and columns of the matrices: a product that is large for the device, and takes a fraction of a second.
PRODUCT_SIDE = {"cpu": 3072, "cuda": 8192}
# Many times the caches.
COPIED_SIDE = {"cpu": 8192, "cuda": 24576}
NUM_TRIALS = 3


def measure_with_peaks(
    systems: Sequence[System], num_rounds: int, num_threads: int, device: str, waits_for_quiet: bool = True
) -> tuple[Results, Peaks, Results]:
    """Time systems in turns, as `harness.measure` does, and the peaks of their device with them, in the same rounds.

    Returns:
        The samples of the systems; the peaks, the best of all rounds; and their samples, which also say how much of
        the machine others left in each round.
    """
    found = measure([*systems, System(NAME, open_peaks, {"device": device})], num_rounds, num_threads, waits_for_quiet)
    samples = dict(found.samples)
    of_peaks = samples.pop(NAME)
    best = (max(sample[rate] for sample in of_peaks) for rate in ("flops_per_s", "bytes_per_s"))
    return Results(samples, found.other_cores), Peaks(*best), Results({NAME: of_peaks}, found.other_cores)


def in_words(peaks: Results) -> str:
    """What was reached: the median of the rounds, and their range."""
    units = {"flops_per_s": "GFLOP/s", "bytes_per_s": "GB/s"}
    rates = {unit: [value / 1e9 for value in peaks.values(NAME, rate)] for rate, unit in units.items()}
    parts = [f"{median(found):.0f} {unit} ({min(found):.0f} to {max(found):.0f})" for unit, found in rates.items()]
    return f"{NAME}: {', '.join(parts)}"


def open_peaks(num_threads: int, device: str) -> Pass:
    """The best of several trials, in the dtype that `benchmarks.timing.hugging_face.DTYPES` names for the device.

    Arithmetic: a square matrix product, on a CPU in ONNX Runtime, which is faster there than PyTorch, and on a GPU in
    PyTorch. Memory: a copy, which reads and writes, or a matrix by a vector, which reads, whichever moves more.
    """
    import torch

    torch.set_num_threads(num_threads)
    side = PRODUCT_SIDE[device]
    multiply = _onnxruntime_product(side, num_threads) if device == "cpu" else _torch_product(side, device)
    matrix = _matrix(COPIED_SIDE[device], device)
    copy, vector = torch.empty_like(matrix), matrix[0].clone()

    def run() -> Sample:
        copied_per_s = 2 * matrix.nbytes / _least_s(lambda: copy.copy_(matrix), device)
        read_per_s = matrix.nbytes / _least_s(lambda: torch.mv(matrix, vector), device)
        return {
            "flops_per_s": 2 * side**3 / _least_s(multiply, device),
            "bytes_per_s": max(copied_per_s, read_per_s),
            "copied_bytes_per_s": copied_per_s,
            "read_bytes_per_s": read_per_s,
        }

    return run


def _matrix(side: int, device: str) -> torch.Tensor:
    import torch

    from benchmarks.timing.hugging_face import DTYPES

    return torch.randn(side, side, dtype=getattr(torch, DTYPES[device]), device=device)


def _torch_product(side: int, device: str) -> Callable[[], object]:
    first, second = _matrix(side, device), _matrix(side, device)
    return lambda: first @ second


def _onnxruntime_product(side: int, num_threads: int) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from hivtp.export.graph.builder import IR_VERSION, OPSET

    matrix = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["rows", "matrix"], ["product"])],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [side, side])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"rows": matrix})


def _least_s(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several calls; the first warms up."""
    import torch

    times = []
    for _ in range(1 + NUM_TRIALS):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
