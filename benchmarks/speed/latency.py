"""The vision stage of our bundles against Hugging Face's: `python -m benchmarks.speed.latency`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.graph_profile import open_profiled, pixels
from benchmarks.timing.harness import Pass, Results, Sample, Stopwatch, System, measure_once
from benchmarks.timing.hugging_face import PapersWay, StageClock, devices, load, place
from benchmarks.timing.peaks import in_words, measure_with_peaks
from benchmarks.timing.record import Row, report
from benchmarks.timing.stages import by_profile, stages, table, text
from benchmarks.timing.workspace import Workspace, add_options, engines
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hivtp.engines.base import Device

HUGGING_FACE = "Hugging Face sdpa, unpruned"
PAPERS_WAY = "Hugging Face eager, the paper's way"
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


def open_hugging_face(
    num_threads: int,
    checkpoint: Path,
    device: str,
    num_tiles: int,
    is_papers_way: bool = False,
    tower_attention: str = "sdpa",
) -> Pass:
    """Tower and projector as transformers runs them; or eager in all layers, and the selection on the host."""
    import torch

    model = load(checkpoint, num_threads, device, "eager" if is_papers_way else tower_attention)
    inputs = torch.from_numpy(pixels(num_tiles, model.config.vision_config.image_size)).to(device, model.dtype)
    clock = StageClock(device, model)
    encode = PapersWay(model, clock).encode if is_papers_way else model.get_image_features

    def run() -> Sample:
        with torch.inference_mode():
            clock.start("vision_ms")
            encode(inputs)
            clock.stop("vision_ms")
        return clock.take()

    return run


def open_bundle(
    num_threads: int,
    bundle: Path,
    engine: str,
    num_tiles: int,
    settings: Mapping[str, Any] | None = None,
    rows_device: Device | None = None,
) -> Pass:
    """The vision stage of a bundle as the pipeline runs it.

    Args:
        num_threads: of the engine.
        bundle: its folder.
        engine: see open_vision_engine.
        num_tiles: of each run.
        settings: further ones of EngineSettings.
        rows_device: where the embeddings are left, if the engine can.
    """
    from hivtp.engines import EngineSettings
    from hivtp.engines.bundle import Bundle
    from hivtp.runtime.vision.stage import DEFAULT_MAX_TILES_PER_RUN, VisionStage

    opened = Bundle.open(bundle)
    stage = VisionStage.open(
        opened, EngineSettings(num_threads, **(settings or {})), DEFAULT_MAX_TILES_PER_RUN, engine
    ).leaving_rows_on(rows_device)
    inputs = pixels(num_tiles, opened.manifest.vision.image_size)

    def run() -> Sample:
        with Stopwatch() as watch:
            stage.encode(inputs)
        return {"vision_ms": watch.ms}

    return run


def systems(checkpoint: Path, bundles: Mapping[str, Path], device: str, num_tiles: int) -> list[System]:
    """All that a device runs."""
    model = {"checkpoint": checkpoint, "device": device, "num_tiles": num_tiles}
    found = [
        System(HUGGING_FACE, open_hugging_face, model),
        System(PAPERS_WAY, open_hugging_face, {**model, "is_papers_way": True}),
    ]
    for name, bundle in bundles.items():
        for engine in engines(bundle, device):
            label = name if device == "cpu" else f"{name}, {engine}"
            found.append(System(label, open_bundle, {"bundle": bundle, "engine": engine, "num_tiles": num_tiles}))
    return found


def vision_floors(systems: Sequence[System], floors: Floors) -> dict[str, float | None]:
    """The floor of each of our systems."""
    ours = (system for system in systems if "bundle" in system.arguments)
    return {system.name: floors.vision_ms(system.arguments["bundle"], system.arguments["num_tiles"]) for system in ours}


def vision_rows(results: Results, device: str, floors: Mapping[str, float | None]) -> list[Row]:
    """Every system by the unpruned Hugging Face model; the goals are those of a CPU."""
    goals = GOALS if device == "cpu" else {}
    return [
        Row.of(results, name, "vision_ms", HUGGING_FACE, goals.get(name[:4]), floors.get(name))
        for name in results.samples
    ]


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
    tables, results, printed = {}, {}, []
    for num_tiles in options.tiles:
        for device in devices():
            title = f"vision stage{place(device)}, tiles: {num_tiles}"
            print(title)
            timed = systems(workspace.checkpoint, bundles, device, num_tiles)
            found, peaks, results[f"peaks, {title}"] = measure_with_peaks(
                timed, options.rounds, options.threads, device
            )
            results[title] = found
            floors = vision_floors(timed, Floors(workspace.checkpoint, device, peaks))
            tables[title] = vision_rows(found, device, floors)
        title = f"vision stage, tiles: {num_tiles}"
        print(by_profile(title))
        profiled = [System(name, open_profiled, {"bundle": bundles[name], "num_tiles": num_tiles}) for name in PROFILED]
        profiles = results[by_profile(title)] = measure_once(profiled, options.threads)
        tables[f"selecting as a share of the vision stage, tiles: {num_tiles}"] = selection_rows(profiles)
        printed.append(f"{title}\n{text(table(stages(results[title].samples, profiles.samples)))}")
    report(options, tables, results)
    print("\n" + "\n".join(in_words(found) for title, found in results.items() if title.startswith("peaks")))
    print("\n" + "\n\n".join(printed))


if __name__ == "__main__":
    main()
