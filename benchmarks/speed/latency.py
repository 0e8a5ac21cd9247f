"""The vision stage of our bundles against Hugging Face's: `python -m benchmarks.speed.latency`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.graph_profile import open_profiled, pixels
from benchmarks.timing.harness import Results, Stopwatch, measure_once
from benchmarks.timing.hugging_face import PAPERS_WAY, UNPRUNED, PapersWay, StageClock, load
from benchmarks.timing.peaks import in_words, measure_with_peaks
from benchmarks.timing.record import Row, report
from benchmarks.timing.stages import by_profile
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.timing.worker import Pass, Sample

BUNDLES = {
    "fp32, unpruned": ExportSettings(is_pruned=False),
    "fp32, preset paper": ExportSettings(preset="paper"),
    "fp32, preset 192": ExportSettings(preset="192"),
    "fp32, preset 64": ExportSettings(preset="64"),
    "fp16, unpruned": ExportSettings(is_pruned=False, vision_precision="fp16"),
    "fp16, preset 192": ExportSettings(preset="192", vision_precision="fp16"),
    "int8, preset 192": ExportSettings(preset="192", vision_precision="int8"),
}
GOALS = {"fp32": 0.50, "int8": 0.20}
# Of these it is looked up where the time goes inside the graph.
PROFILED = ("fp32, unpruned", "fp32, preset 192", "fp16, preset 192", "int8, preset 192")
SELECTION_GOAL = 0.002


def open_hugging_face(num_threads: int, checkpoint: Path, num_tiles: int, is_papers_way: bool = False) -> Pass:
    """Tower and projector as transformers runs them; or eager in all layers, and the selection on the host."""
    import torch

    model = load(checkpoint, num_threads, "eager" if is_papers_way else "sdpa")
    inputs = torch.from_numpy(pixels(num_tiles, model.config.vision_config.image_size))
    clock = StageClock(model)
    encode = PapersWay(model, clock).encode if is_papers_way else model.get_image_features

    def run() -> Sample:
        with torch.inference_mode():
            clock.start("vision_ms")
            encode(inputs)
            clock.stop("vision_ms")
        return clock.take()

    return run


def open_bundle(num_threads: int, bundle: Path, num_tiles: int) -> Pass:
    """The vision stage of a bundle as the pipeline runs it."""
    from hivtp.engines import EngineSettings, open_vision_engine
    from hivtp.engines.bundle import Bundle
    from hivtp.runtime.vision.options import MAX_TILES_PER_RUN
    from hivtp.runtime.vision.stage import VisionStage

    opened = Bundle.open(bundle)
    engine = open_vision_engine(opened, "onnxruntime", EngineSettings(num_threads))
    stage = VisionStage(engine, opened.manifest.vision, MAX_TILES_PER_RUN)
    inputs = pixels(num_tiles, opened.manifest.vision.image_size)

    def run() -> Sample:
        with Stopwatch() as watch:
            stage.encode(inputs)
        return {"vision_ms": watch.ms}

    return run


def selection_rows(results: Results) -> list[Row]:
    """The op by the whole graph that it stands in."""
    return [
        Row(name, results.values(name, "selection_ms"), results.values(name, "vision_ms"), SELECTION_GOAL)
        for name in results.samples
        if results.values(name, "selection_ms")[0]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "latency.json")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 5], help="batch sizes (default: 1 5)")
    options = parser.parse_args(arguments)
    # One layer of language model is enough: only the vision stage is timed.
    workspace = Workspace.open(options, "latency", text={"num_hidden_layers": 1})
    bundles = workspace.bundles(BUNDLES)
    tables: dict[str, list[Row]] = {}
    results: dict[str, Results] = {}
    printed = []
    for num_tiles in options.tiles:
        title = f"vision stage, tiles: {num_tiles}"
        print(title)
        model = {"checkpoint": workspace.checkpoint, "num_tiles": num_tiles}
        timed = [
            System(UNPRUNED, open_hugging_face, model),
            System(PAPERS_WAY, open_hugging_face, {**model, "is_papers_way": True}),
            *(System(name, open_bundle, {"bundle": path, "num_tiles": num_tiles}) for name, path in bundles.items()),
        ]
        found, peaks, of_peaks = measure_with_peaks(timed, options.rounds, options.threads)
        results |= {title: found, f"peaks, {title}": of_peaks}
        floors = Floors(workspace.checkpoint, peaks)
        floors_ms = {name: floors.vision_ms(path, num_tiles) for name, path in bundles.items()}
        tables[title] = [
            Row.of(found, name, "vision_ms", UNPRUNED, GOALS.get(name[:4]), floors_ms.get(name))
            for name in found.samples
        ]
        print(by_profile(title))
        profiled = [System(name, open_profiled, {"bundle": bundles[name], "num_tiles": num_tiles}) for name in PROFILED]
        profiles = results[by_profile(title)] = measure_once(profiled, options.threads)
        tables[f"selecting as a share of the {title}"] = selection_rows(profiles)
        printed.append(f"{title}, {in_words(of_peaks)}")
    report(options, tables, results)
    print("\n" + "\n".join(printed))


if __name__ == "__main__":
    main()
