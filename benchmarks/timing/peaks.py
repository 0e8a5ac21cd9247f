"""The rates that a CPU reaches in arithmetic and in memory, each by the plainest program that shows it."""

from __future__ import annotations

import time
from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import Results, measure
from benchmarks.timing.worker import System

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.timing.worker import Pass, Sample

NAME = "large products and copies"
RATES = tuple(field.name for field in fields(Peaks))
UNITS = dict(zip(RATES, ("GFLOP/s", "GOP/s in 8 bits", "GB/s"), strict=True))
# Rows and columns of the matrices: a product that takes a fraction of a second, and many times the caches.
PRODUCT_SIDE = 3072
COPIED_SIDE = 8192
NUM_TRIALS = 3


def measure_with_peaks(systems: Sequence[System], num_rounds: int, num_threads: int) -> tuple[Results, Peaks, Results]:
    """Time systems in turns, as `harness.measure` does, and the peaks of the machine with them, in the same rounds.

    Returns:
        The samples of the systems; the peaks, the best of all rounds; and their samples, which also say how much of
        the machine others left in each round.
    """
    found = measure([*systems, System(NAME, open_peaks)], num_rounds, num_threads)
    samples = dict(found.samples)
    of_peaks = samples.pop(NAME)
    best = Peaks(**{rate: max(sample[rate] for sample in of_peaks) for rate in RATES})
    return Results(samples, found.other_cores), best, Results({NAME: of_peaks}, found.other_cores)


def in_words(peaks: Results) -> str:
    """What was reached: the median of the rounds, and their range."""
    found = {unit: [value / 1e9 for value in peaks.values(NAME, rate)] for rate, unit in UNITS.items()}
    parts = [f"{median(values):.0f} {unit} ({min(values):.0f} to {max(values):.0f})" for unit, values in found.items()]
    return f"{NAME}: {', '.join(parts)}"


def open_peaks(num_threads: int) -> Pass:
    """The best of several trials.

    Arithmetic: square products in ONNX Runtime, in float32 and of uint8 by int8, with the kernels that the graphs of
    bundles get here; rounding and scaling, which those do too, are not counted. Memory: a copy, which reads and writes,
    or a matrix by a vector, which reads, whichever moves more.
    """
    import torch

    torch.set_num_threads(num_threads)
    multiply, multiply_int8 = (open_product(PRODUCT_SIDE, num_threads, is_int8=is_int8) for is_int8 in (False, True))
    matrix = torch.randn(COPIED_SIDE, COPIED_SIDE)
    copy, vector = torch.empty_like(matrix), matrix[0].clone()

    def run() -> Sample:
        copied_per_s = 2 * matrix.nbytes / _min_s(lambda: copy.copy_(matrix))
        read_per_s = matrix.nbytes / _min_s(lambda: torch.mv(matrix, vector))
        return {
            "flops_per_s": 2 * PRODUCT_SIDE**3 / _min_s(multiply),
            "int8_ops_per_s": 2 * PRODUCT_SIDE**3 / _min_s(multiply_int8),
            "bytes_per_s": max(copied_per_s, read_per_s),
            "copied_bytes_per_s": copied_per_s,
            "read_bytes_per_s": read_per_s,
        }

    return run


def open_product(side: int, num_threads: int, *, is_int8: bool) -> Callable[[], Any]:
    """A product of two square matrices, the second a constant, in float32 or of uint8 by int8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from hivtp.engines import EngineSettings
    from hivtp.engines.onnxruntime import session_options
    from hivtp.export.graph.builder import IR_VERSION, OPSET

    random, shape = np.random.default_rng(0), (side, side)
    op_type, inputs, dtypes = "MatMul", ["rows", "matrix"], (TensorProto.FLOAT, TensorProto.FLOAT)
    rows: np.ndarray[Any, Any]
    if is_int8:
        op_type, inputs, dtypes = "MatMulInteger", [*inputs, "zero_point"], (TensorProto.UINT8, TensorProto.INT32)
        rows, matrix = random.integers(0, 256, shape, np.uint8), random.integers(-127, 128, shape, np.int8)
    else:
        rows, matrix = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    constants = {"matrix": matrix, "zero_point": np.array(128, np.uint8)}
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["product"])],
        "product",
        [helper.make_tensor_value_info("rows", dtypes[0], shape)],
        [helper.make_tensor_value_info("product", dtypes[1], shape)],
        [numpy_helper.from_array(constants[name], name) for name in inputs[1:]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = session_options(EngineSettings(num_threads))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"rows": rows})[0]


def _min_s(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls; the first warms up."""
    times = []
    for _ in range(1 + NUM_TRIALS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[1:])
