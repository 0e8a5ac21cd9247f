"""The selection on a GPU, as one kernel and as PyTorch's operators: `python -m benchmarks.gpu.kernel`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops import PRESETS, PruningSpec, op, select, torch_op
from hivtp_ops.torch_kernel import load_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

GRID = (24, 24)
# Microseconds on an H200, by tiles.
GOALS_US = {1: 10.0, 64: 20.0}
# One replay of so many calls is long beside what the events themselves take.
CALLS_PER_GRAPH = 50
CALLS_FROM_HOST = 200


@dataclass(frozen=True)
class Timing:
    """One line of the table.

    Attributes:
        label: what ran, on which scores.
        num_tiles: tiles of a call.
        device_us: time of one call on the GPU, per round; its gap to the next call of the CUDA graph is part of it.
        host_us: time until the call returns to Python, per round.
        goal_us: of `device_us`; None where there is none.
    """

    label: str
    num_tiles: int
    device_us: Sequence[float]
    host_us: Sequence[float]
    goal_us: float | None = None


def maps(num_tiles: int) -> dict[str, NDArray[np.float32]]:
    """Scores as they come, and those on which a search takes the most steps: all the same."""
    shape = (num_tiles, GRID[0] * GRID[1])
    random = np.random.default_rng(0).random(shape, dtype=np.float32)
    return {"random scores": random / random.sum(axis=1, keepdims=True), "equal scores": np.full_like(random, 0.5)}


def systems(spec: PruningSpec) -> dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """The two forms of the op."""
    keep = op.NO_KEEP if spec.keep is None else spec.keep
    settings = (*GRID, spec.regions, spec.global_ratio, spec.window, keep)
    return {
        "kernel": lambda scores: torch_op.hierarchical_prune(scores, *settings),
        "operators": lambda scores: torch_op._select(scores, *settings),
    }


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record CALLS_PER_GRAPH calls."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph


def device_us(graph: torch.cuda.CUDAGraph) -> float:
    """Time one call on the GPU."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / CALLS_PER_GRAPH


def host_us(call: Callable[[], object]) -> float:
    """Time one call until it returns, while the GPU works on."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS_FROM_HOST):
        call()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed * 1e6 / CALLS_FROM_HOST


def measure(spec: PruningSpec, num_tiles: int, num_rounds: int) -> list[Timing]:
    """Check and time both forms in turns; the first round warms up and is dropped."""
    import torch

    calls = {}
    for scores_name, scores in maps(num_tiles).items():
        on_gpu = torch.from_numpy(scores).cuda()
        expected = select(scores, GRID, spec)
        for name, system in systems(spec).items():
            indices, counts = system(on_gpu)
            assert np.array_equal(indices.cpu().numpy(), expected.indices), name
            assert np.array_equal(counts.cpu().numpy(), expected.counts), name
            calls[f"{name}, {scores_name}"] = lambda system=system, on_gpu=on_gpu: system(on_gpu)
    graphs = {label: capture(call) for label, call in calls.items()}
    rounds = [
        {label: (device_us(graphs[label]), host_us(call)) for label, call in calls.items()}
        for _ in range(1 + num_rounds)
    ][1:]
    return [
        Timing(
            label,
            num_tiles,
            [samples[label][0] for samples in rounds],
            [samples[label][1] for samples in rounds],
            GOALS_US.get(num_tiles) if label.startswith("kernel") else None,
        )
        for label in calls
    ]


def table(timings: Sequence[Timing]) -> str:
    """Medians and ranges, beside the goals."""
    width = max(len(timing.label) for timing in timings)
    lines = [f"{'':<{width}}  {'tiles':>5} {'device us':>10} {'min':>8} {'max':>8} {'host us':>8} {'goal':>6}"]
    for timing in timings:
        on_device = median(timing.device_us)
        line = (
            f"{timing.label:<{width}}  {timing.num_tiles:5} {on_device:10.2f} {min(timing.device_us):8.2f} "
            f"{max(timing.device_us):8.2f} {median(timing.host_us):8.1f}"
        )
        goal = timing.goal_us
        verdict = "" if goal is None else f" {goal:6.1f}  {'met' if on_device <= goal else 'missed'}"
        lines.append(line + verdict)
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="192", help="(default: %(default)s)")
    parser.add_argument("--tiles", type=int, nargs="+", default=list(GOALS_US), help="batch sizes (default: 1 64)")
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernel-gpu.json"))
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; this is measured on a GPU only")
    spec = PRESETS[options.preset]
    started = time.perf_counter()
    load_kernel(GRID, spec, torch.cuda.get_device_capability())
    compile_ms = (time.perf_counter() - started) * 1e3
    found = {**environment(), "preset": options.preset, "compile_ms": compile_ms}
    print("\n".join(f"{key}: {value}" for key, value in found.items()))
    timings = [timing for num_tiles in options.tiles for timing in measure(spec, num_tiles, options.rounds)]
    print(f"\n{table(timings)}")
    written = {"environment": found, "timings": [asdict(timing) for timing in timings]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"\nall samples: {options.output}")


if __name__ == "__main__":
    main()
