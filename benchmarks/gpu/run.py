"""What is to be reached on a GPU, ours and Hugging Face in the same rounds: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed import ttft
from benchmarks.timing.harness import Results, measure
from benchmarks.timing.hugging_face import DTYPES, UNPRUNED
from benchmarks.timing.large_checkpoint import write_large_checkpoint
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_options
from hivtp.export.settings import ExportSettings
from hivtp_ops import PRESETS, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.timing.worker import Pass

OUTPUT = Path(__file__).parents[1] / "results" / "gpu.json"
EAGER = "Hugging Face eager, unpruned"
BUDGETS: dict[str, dict[str, Any]] = {"unpruned": {"is_pruned": False}, "preset 192": {"preset": "192"}}
ENGINES = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "transformers")
DEVICE, PRECISION = "cuda", "fp16"
NUM_NEW_TOKENS = 16
# What is timed, by which system, and what preset 192 is to take of its time on an H200, at 7 B shapes.
QUANTITIES = {
    "vision stage": ("vision_ms", EAGER, 0.30),
    "time to first token": ("ttft_ms", UNPRUNED, 0.35),
    "decode per token": ("decode_ms_per_token", UNPRUNED, None),
}
# Microseconds on an H200, by tiles of 24 x 24 patches.
KERNEL_GOALS_US = {1: 10.0, 64: 20.0}
# The first run of a shape compiles; the harness drops one more.
NUM_WARM_UPS = 2
# One replay of this many calls is long beside what the events themselves take.
CALLS_PER_GRAPH = 50


def open_hugging_face(num_threads: int, **arguments: Any) -> Pass:
    """See ttft.open_hugging_face."""
    return _warmed(ttft.open_hugging_face(num_threads, num_new_tokens=NUM_NEW_TOKENS, **arguments))


def open_bundle(num_threads: int, bundle: Path, engine: Any, device: str, checkpoint: Path) -> Pass:
    """A pipeline on the device: "transformers" runs both parts in PyTorch; with another engine, the decoder answers."""
    from hivtp import LanguageOptions, Pipeline, VisionOptions
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.tensorrt.plan import has_plans
    from hivtp.export.plan import PlanSettings, export_plan

    language = LanguageOptions(device=device)
    if engine == "transformers":
        language = LanguageOptions(engine, device, checkpoint=checkpoint, dtype=DTYPES[device])  # type: ignore[arg-type]
    elif engine.startswith("tensorrt") and not has_plans(Bundle.open(bundle), engine):
        export_plan(bundle, PlanSettings(engine), is_quiet=True)
    pipeline = Pipeline.load(bundle, vision=VisionOptions(engine, num_threads), language=language)
    return _warmed(ttft.make_pass(pipeline, NUM_NEW_TOKENS))


def _warmed(run: Pass) -> Pass:
    for _ in range(NUM_WARM_UPS):
        run()
    return run


def measure_engine(options: argparse.Namespace, workspace: Workspace, engine: str) -> tuple[dict[str, Any], Results]:
    """Both budgets with an engine, by Hugging Face."""
    budgets = {
        name: ExportSettings(vision_precision=PRECISION, language_precision=PRECISION, **budget)  # type: ignore[arg-type]
        for name, budget in BUDGETS.items()
    }
    model = {"checkpoint": workspace.checkpoint, "device": DEVICE}
    systems = [
        System(EAGER, open_hugging_face, {**model, "tower_attention": "eager"}),
        System(UNPRUNED, open_hugging_face, model),
        *(
            System(name, open_bundle, {**model, "bundle": bundle, "engine": engine})
            for name, bundle in workspace.bundles(budgets).items()
        ),
    ]
    found = measure(systems, options.rounds, options.threads)
    tables = {
        f"{engine}: {title}": [
            Row.of(found, name, quantity, baseline, goal if name == "preset 192" else None) for name in found.samples
        ]
        for title, (quantity, baseline, goal) in QUANTITIES.items()
    }
    return tables, found


def measure_kernel(num_tiles: int, num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the selection kernel on the GPU, by the scores that it is given; it is checked first."""
    import torch

    from hivtp_ops.torch_kernel import load_kernel

    grid, spec = (24, 24), PRESETS["192"]
    kernel = load_kernel(grid, spec, torch.cuda.get_device_capability())
    random = np.random.default_rng(0).random((num_tiles, 576), dtype=np.float32)
    found = {}
    # A search takes the most steps where all scores are equal.
    for name, scores in {"random scores": random, "equal scores": np.full_like(random, 0.5)}.items():
        on_gpu = torch.from_numpy(scores).cuda()
        assert np.array_equal(kernel(on_gpu)[0].cpu().numpy(), select(scores, grid, spec).indices), name
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_PER_GRAPH):
                kernel(on_gpu)
        times = []
        for _ in range(NUM_WARM_UPS + num_rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / CALLS_PER_GRAPH)
        found[name] = times[NUM_WARM_UPS:]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report; an engine that cannot run here is named with its reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, str(OUTPUT), "7b")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device that PyTorch sees, and this is measured on a GPU only.")
    tables, results = {}, {}
    for num_tiles, goal_us in KERNEL_GOALS_US.items():
        tables[f"selection kernel, {num_tiles} tiles, by {goal_us:g} us"] = [
            Row(scores, times, [goal_us / 1e3] * len(times), goal=1.0)
            for scores, times in measure_kernel(num_tiles, options.rounds).items()
        ]
    workspace = Workspace.open(options, "gpu", write_large_checkpoint, dtype="float16")
    for engine in ENGINES:
        try:
            found, results[engine] = measure_engine(options, workspace, engine)
            tables |= found
        except RuntimeError as error:
            print(f"  {engine} is left out: {str(error).strip().splitlines()[-1]}", flush=True)
    major, minor = torch.cuda.get_device_capability()
    gpu = {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    report(options, tables, results, gpu)


if __name__ == "__main__":
    main()
