"""Where the time of a bundle's vision graph goes, by ONNX Runtime's profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.timing.worker import Pass, Sample

NUM_PROFILED_RUNS = 3


def pixels(num_tiles: int, image_size: int) -> NDArray[np.float32]:
    """The same normalised tiles for every system."""
    shape = (num_tiles, 3, image_size, image_size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def open_profiled(num_threads: int, bundle: Path, num_tiles: int) -> Pass:
    """The times of the stages inside the graph; the pass warms up by itself."""
    import onnxruntime

    from hivtp.engines import EngineSettings
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.onnxruntime import session_options

    opened = Bundle.open(bundle)
    inputs = {"pixel_values": pixels(num_tiles, opened.manifest.vision.image_size)}

    def run() -> Sample:
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(EngineSettings(num_threads))
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            session = onnxruntime.InferenceSession(opened.vision_file, options, providers=["CPUExecutionProvider"])
            for _ in range(1 + NUM_PROFILED_RUNS):
                session.run(None, inputs)
            return stage_times(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))

    return run


def stage_times(events: Sequence[dict[str, Any]]) -> Sample:
    """The median run of those after the first, from onnxruntime's trace events (times in microseconds)."""
    runs = [event for event in events if event["name"] == "model_run"][1:]
    run = sorted(runs, key=lambda event: event["dur"])[len(runs) // 2]
    nodes = [event for event in events if event["cat"] == "Node" and 0 <= event["ts"] - run["ts"] < run["dur"]]
    return _stages(run, sorted(nodes, key=lambda event: event["ts"]))


def _stages(run: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> Sample:
    """The selection's own nodes, the projector's, and the rest of the run, in milliseconds."""
    # onnxruntime inlines the function; its nodes keep the op's name.
    selection_us = sum(node["dur"] for node in nodes if "HierarchicalPrune" in node["name"])
    # Fused nodes have names of onnxruntime's own, but the projector is what runs last.
    first = next(index for index, node in enumerate(nodes) if node["name"].startswith("projector."))
    projector_us = sum(node["dur"] for node in nodes[first:] if "HierarchicalPrune" not in node["name"])
    return {
        "vision_ms": run["dur"] / 1e3,
        "tower_ms": (run["dur"] - selection_us - projector_us) / 1e3,
        "selection_ms": selection_us / 1e3,
        "projector_ms": projector_us / 1e3,
    }
