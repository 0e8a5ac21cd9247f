"""The vision stage of our bundles against Hugging Face's: `python -m benchmarks.latency`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Pass, Results, Row, Sample, Stopwatch, System, measure, report
from benchmarks.workspace import Workspace, add_options
from hivtp.export.exporter import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HUGGING_FACE = "Hugging Face sdpa, unpruned"
PAPERS_WAY = "Hugging Face eager, the paper's way"
BUNDLES = {
    "fp32, unpruned": ExportSettings(is_pruned=False),
    "fp32, preset paper": ExportSettings(preset="paper"),
    "fp32, preset 192": ExportSettings(preset="192"),
    "fp32, preset 64": ExportSettings(preset="64"),
    "int8, preset 192": ExportSettings(preset="192", vision_precision="int8"),
}
GOALS = {"fp32": 0.50, "int8": 0.20}
PROFILED = ("fp32, preset 192", "int8, preset 192")
SELECTING_GOAL = 0.002
NUM_PROFILED_RUNS = 5


def pixels(num_tiles: int, image_size: int) -> NDArray[np.float32]:
    """The same normalised tiles for every system."""
    shape = (num_tiles, 3, image_size, image_size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def open_hugging_face(num_threads: int, checkpoint: Path, num_tiles: int) -> Pass:
    """Tower and projector as transformers runs them."""
    import torch

    model = _load_llava(checkpoint, num_threads, "sdpa")
    inputs = torch.from_numpy(pixels(num_tiles, model.config.vision_config.image_size))

    def run() -> Sample:
        with torch.inference_mode(), Stopwatch() as watch:
            model.get_image_features(pixel_values=inputs)
        return {"vision_ms": watch.ms}

    return run


def open_papers_way(num_threads: int, checkpoint: Path, num_tiles: int) -> Pass:
    """The steps of the published code (arXiv 2509.23663).

    Attention is materialised in all layers and all of them run, the selection happens on the host, and the
    projector takes the kept patches. Unlike the published code it serves more than one tile.
    """
    import torch

    from hivtp.export.clip import VisionShape
    from hivtp_ops import PruningSpec, select

    model = _load_llava(checkpoint, num_threads, "eager")
    shape = VisionShape.of(model.config)
    spec = PruningSpec.preset("paper", shape.grid).resolve(shape.num_layers)
    assert spec.first_layer is not None, "resolve sets the layers"
    assert spec.num_layers is not None, "resolve sets the layers"
    scoring_layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)
    inputs = torch.from_numpy(pixels(num_tiles, shape.image_size))

    def run() -> Sample:
        with torch.inference_mode(), Stopwatch() as watch:
            outputs = model.model.vision_tower(inputs, output_attentions=True, output_hidden_states=True)
            importance = torch.stack(outputs.attentions[scoring_layers]).mean(dim=(0, 2, 3))[:, 1:]
            selection = select(importance.numpy(), shape.grid, spec)
            features = outputs.hidden_states[model.config.vision_feature_layer][:, 1:]
            for tile, indices, count in zip(features, selection.indices, selection.counts, strict=True):
                model.model.multi_modal_projector(tile[indices[:count]])
        return {"vision_ms": watch.ms}

    return run


def _load_llava(checkpoint: Path, num_threads: int, attention: str) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(num_threads)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def open_bundle(num_threads: int, bundle: Path, num_tiles: int) -> Pass:
    """The vision stage of a bundle as the pipeline runs it."""
    from hivtp.engines import EngineSettings, create_engine
    from hivtp.engines.bundle import Bundle
    from hivtp.runtime.vision import VisionStage

    opened = Bundle.open(bundle)
    engine = create_engine("onnxruntime", opened.vision_file, EngineSettings(num_threads))
    stage = VisionStage(engine, opened.manifest.vision)
    inputs = pixels(num_tiles, opened.manifest.vision.image_size)

    def run() -> Sample:
        with Stopwatch() as watch:
            stage.encode(inputs)
        return {"vision_ms": watch.ms}

    return run


def open_profiled(num_threads: int, bundle: Path, num_tiles: int) -> Pass:
    """The time of the pruning op's own nodes inside the graph, by onnxruntime's profiler."""
    import onnxruntime

    from hivtp.engines.bundle import Bundle

    opened = Bundle.open(bundle)
    inputs = {"pixel_values": pixels(num_tiles, opened.manifest.vision.image_size)}

    def run() -> Sample:
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = num_threads
            options.log_severity_level = 3
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            session = onnxruntime.InferenceSession(opened.vision_file, options, providers=["CPUExecutionProvider"])
            for _ in range(1 + NUM_PROFILED_RUNS):
                session.run(None, inputs)
            return selecting_times(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))

    return run


def selecting_times(events: list[dict[str, Any]]) -> Sample:
    """Medians over the profiled runs but the first, from onnxruntime's trace events (times in microseconds)."""
    runs = [event for event in events if event["name"] == "model_run"][1:]
    selecting_ms = []
    for run in runs:
        end = run["ts"] + run["dur"]
        # onnxruntime inlines the function; its nodes keep the op's name.
        nodes = [
            event["dur"]
            for event in events
            if event["cat"] == "Node" and "HierarchicalPrune" in event["name"] and run["ts"] <= event["ts"] < end
        ]
        assert nodes, "the profile shows no node of the pruning op"
        selecting_ms.append(sum(nodes) / 1e3)
    return {"selecting_ms": median(selecting_ms), "vision_ms": median(run["dur"] for run in runs) / 1e3}


def vision_rows(results: Results) -> list[Row]:
    """Every system by the unpruned Hugging Face model."""
    baseline = results.values(HUGGING_FACE, "vision_ms")
    return [Row(name, results.values(name, "vision_ms"), baseline, GOALS.get(name[:4])) for name in results.samples]


def selecting_rows(results: Results) -> list[Row]:
    """The op by the whole graph that it stands in."""
    return [
        Row(name, results.values(name, "selecting_ms"), results.values(name, "vision_ms"), SELECTING_GOAL)
        for name in results.samples
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "latency.json")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    options = parser.parse_args(arguments)
    # One layer of language model is enough: only the vision stage is timed.
    workspace = Workspace.open(options, "latency", text={"num_hidden_layers": 1})
    bundles = {name: workspace.bundle(name, settings) for name, settings in BUNDLES.items()}
    tables, results = {}, {}
    for num_tiles in options.tiles:
        checkpoint = {"checkpoint": workspace.checkpoint, "num_tiles": num_tiles}
        title = f"vision stage, tiles: {num_tiles}"
        print(title)
        results[title] = measure(
            [
                System(HUGGING_FACE, open_hugging_face, checkpoint),
                System(PAPERS_WAY, open_papers_way, checkpoint),
                *(
                    System(name, open_bundle, {"bundle": path, "num_tiles": num_tiles})
                    for name, path in bundles.items()
                ),
            ],
            options.rounds,
            options.threads,
        )
        tables[title] = vision_rows(results[title])
        title = f"selecting as a share of the vision stage, tiles: {num_tiles}"
        print(title)
        profiled = [System(name, open_profiled, {"bundle": bundles[name], "num_tiles": num_tiles}) for name in PROFILED]
        results[title] = measure(profiled, 1, options.threads)
        tables[title] = selecting_rows(results[title])
    report(options, tables, results)


if __name__ == "__main__":
    main()
