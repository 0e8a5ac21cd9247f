"""All that is to be reached on a GPU, ours and Hugging Face in turns: `python -m benchmarks.gpu.run`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.gpu import kernel
from benchmarks.gpu.goals import Goal, goal_table
from benchmarks.gpu.systems import Language, Variant, open_answers, open_batches, open_warm
from benchmarks.speed import latency, throughput, ttft
from benchmarks.speed.budgets import PICTURE_SIZE
from benchmarks.speed.ttft import HUGGING_FACE
from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.harness import Results, System
from benchmarks.timing.large_checkpoint import write_large_checkpoint
from benchmarks.timing.peaks import measure_with_peaks
from benchmarks.timing.record import Row, measured, table
from benchmarks.timing.stages import text
from benchmarks.timing.workspace import Workspace, add_run_options, builds_plans, engines
from hivtp.engines.files import write_whole
from hivtp.export.settings import ExportSettings
from hivtp_ops import PRESETS
from hivtp_ops.torch_kernel import load_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hivtp.export.graph.builder import VisionPrecision

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
EAGER = "Hugging Face eager, unpruned"
UNPRUNED, PRUNED = "unpruned", "preset 192"
BUDGETS: Mapping[str, Mapping[str, Any]] = {UNPRUNED: {"is_pruned": False}, PRUNED: {"preset": "192"}}
# The language model runs in transformers, so the bundles need no decoder.
DECODER: Final = "none"
# LLaVA-NeXT's 5 tiles take 3,006 tokens unpruned, which is more than the smaller shapes have positions for.
NUM_POSITIONS = 4096
# In transformers, by whether torch.compile compiles it.
LANGUAGES = {"plain": False, "compiled": True}
LANGUAGE_PRECISIONS = {"cpu": "fp32", "cuda": "fp16"}
# The vision stage is so short that one run after a pause would be that of a GPU that wakes up.
VISION_RUNS = 10
NUM_CALIBRATION_PICTURES = 4
ANSWER_TOKENS = 16
BATCH_SIZE, BATCH_TOKENS = 8, 128


@dataclass(frozen=True)
class Measured:
    """What one part of the table came to."""

    tables: Mapping[str, Sequence[Row]]
    results: Mapping[str, Results]
    goals: Sequence[Goal]


@dataclass(frozen=True)
class Bench:
    """How all parts are measured, and where.

    Attributes:
        options: of the command line.
        device: "cuda", or "cpu", which runs all parts but the kernel.
    """

    options: argparse.Namespace
    device: str

    def workspace(self, name: str, family: str = "llava", language: Mapping[str, Any] | None = None) -> Workspace:
        """A checkpoint in float16; `language` overrides the config of its language model."""
        folder = self.options.work_dir / "gpu" / self.options.shape / name
        write = partial(write_large_checkpoint, shape=self.options.shape, family=family, dtype="float16")
        text_config = {"max_position_embeddings": NUM_POSITIONS, **(language or {})}
        return Workspace.make(folder, partial(write, text=text_config))

    def variants(
        self,
        workspace: Workspace,
        prefix: str = "",
        precision: VisionPrecision = "fp16",
        calibration: tuple[Path, ...] = (),
    ) -> list[Variant]:
        """Both bundles, each in every engine that opens here; the goals are for what has no prefix to its name."""
        bundles = {
            f"{prefix}{name}": workspace.bundle(
                f"{prefix}{name}",
                ExportSettings(
                    vision_precision=precision, calibration=calibration, language_precision=DECODER, **budget
                ),
            )
            for name, budget in BUDGETS.items()
        }
        return [
            Variant(f"{name}, {engine}", bundle, engine)
            for name, bundle in bundles.items()
            for engine in engines(bundle, self.device)
        ]

    def measure(self, systems: Sequence[System], workspace: Workspace) -> tuple[Results, Floors, Results]:
        """In turns; a GPU's work does not wait for a quiet CPU.

        Returns:
            The samples; the floors of the workspace's bundles; and the peaks that those come from.
        """
        options, waits = self.options, self.device == "cpu"
        found, peaks, of_peaks = measure_with_peaks(systems, options.rounds, options.threads, self.device, waits)
        return found, Floors(workspace.checkpoint, self.device, peaks), of_peaks


def calibration_pictures(folder: Path) -> tuple[Path, ...]:
    """Files of generated pictures, written where there are none yet."""
    files = tuple(folder / f"picture-{index}.png" for index in range(NUM_CALIBRATION_PICTURES))
    for file, picture in zip(files, ttft.photos(), strict=False):
        if not file.exists():
            picture.save(file)
    return files


def vision_ways(engine: str) -> dict[str, dict[str, bool]]:
    """How an engine can run a vision graph, in words and in EngineSettings."""
    if engine in ("onnxruntime", "torch"):
        return {"": {}}
    ways = {"": {}, "CUDA graph": {"uses_cuda_graph": True}}
    return ways | ({"compiled": {"uses_cuda_graph": True, "is_compiled": True}} if engine == "torch-cuda" else {})


def measure_vision(bench: Bench) -> Measured:
    """Tower, selection and projector of one image."""
    # One layer of language model is enough: only the vision stage is timed.
    workspace = bench.workspace("vision", language={"num_hidden_layers": 1})
    warm = {"num_runs": VISION_RUNS, "num_tiles": 1}
    model = {**warm, "open_system": latency.open_hugging_face, "checkpoint": workspace.checkpoint}
    systems = [
        System(name, open_warm, {**model, "device": bench.device, "tower_attention": attention})
        for name, attention in ((EAGER, "eager"), (HUGGING_FACE, "sdpa"))
    ]
    variants = [*bench.variants(workspace), *bench.variants(workspace, "bf16, ", "bf16")]
    if builds_plans(bench.device):
        variants += bench.variants(workspace, "fp8, ", "fp8", calibration_pictures(workspace.folder))
    for variant in variants:
        for way, settings in vision_ways(variant.engine).items():
            name = f"{variant.name}, {way}" if way else variant.name
            # As Hugging Face's, the embeddings stay where the language model wants them.
            bundle = {"bundle": variant.bundle, "engine": variant.engine, "rows_device": bench.device}
            ours = {**warm, "open_system": latency.open_bundle, **bundle, "settings": settings}
            systems.append(System(name, open_warm, ours, is_optional=True))
    found, floors, peaks = bench.measure(systems, workspace)
    by_name = latency.vision_floors(systems, floors)
    rows = [Row.of(found, name, "vision_ms", EAGER, floor_ms=by_name.get(name)) for name in found.samples]
    goals = [
        Goal.of_ratio(f"vision stage, 1 image, {PRUNED}, by {EAGER}", 0.30, pruned(rows)),
        Goal.of_floor(f"vision stage, 1 image, {PRUNED}, by its floor", 2.0, pruned(rows)),
    ]
    return Measured({"vision stage, 1 image": rows}, {"vision": found, "peaks": peaks}, goals)


def measure_kernel(bench: Bench) -> Measured:
    """The selection by itself; needs CUDA."""
    import torch

    spec = PRESETS["192"]
    load_kernel(kernel.GRID, spec, torch.cuda.get_device_capability())
    tables, samples, goals = {}, {}, []
    for num_tiles, bound_us in kernel.GOALS_US.items():
        timings = {timing.label: timing for timing in kernel.measure(spec, num_tiles, bench.options.rounds)}
        rows = []
        for label, timing in timings.items():
            operators = timings[label.replace("kernel", "operators")]
            own_ms, operators_ms = ([us / 1e3 for us in item.device_us] for item in (timing, operators))
            rows.append(Row(label, own_ms, operators_ms))
            both = zip(timing.device_us, timing.host_us, strict=True)
            samples[f"{label}, batch {num_tiles}"] = [{"device_us": on_gpu, "host_us": host} for on_gpu, host in both]
        tables[f"selection, 576 patches, batch {num_tiles}"] = rows
        # The slower of its inputs.
        slowest = max(median(timing.device_us) for label, timing in timings.items() if label.startswith("kernel"))
        goals.append(Goal(f"selection kernel, 576 patches, batch {num_tiles}, us", bound_us, slowest, "kernel"))
    return Measured(tables, {"kernel": Results(samples, [])}, goals)


def measure_answers(
    bench: Bench, name: str, family: str, picture_size: tuple[int, int], goal: float, own_goal: float | None
) -> Measured:
    """Time to first token and per token, one prompt with one picture.

    Args:
        bench: how.
        name: of the part and its checkpoint.
        family: "llava" or "llava_next".
        picture_size: of every picture.
        goal: of the first token, by the unpruned Hugging Face model.
        own_goal: by our own unpruned one; None where there is none.
    """
    workspace = bench.workspace(name, family)
    asked = {"num_new_tokens": ANSWER_TOKENS, "picture_size": picture_size}
    model = {"open_system": ttft.open_hugging_face, "checkpoint": workspace.checkpoint, "device": bench.device}
    ours, bundles = our_systems(bench, workspace, {"open_system": open_answers, **asked})
    found, floors, peaks = bench.measure([System(HUGGING_FACE, open_warm, {**model, **asked}), *ours], workspace)
    precision = LANGUAGE_PRECISIONS[bench.device]
    precisions = {label: (bundle, precision) for label, bundle in bundles.items() if label in found.samples}
    ttft_floors, decode_floors = ttft.answer_floors(found, precisions, floors)
    by_hugging_face = ttft.rows(found, "ttft_ms", {}, ttft_floors)
    by_ours = [
        Row.of(found, label, "ttft_ms", baseline, floor_ms=ttft_floors[label])
        for label in precisions
        if label.startswith(PRUNED) and (baseline := label.replace(PRUNED, UNPRUNED, 1)) in found.samples
    ]
    tables = {
        "time to first token": by_hugging_face,
        "time to first token, by the same unpruned": by_ours,
        "decode per token": ttft.rows(found, "decode_ms_per_token", {}, decode_floors),
    }
    goals = [Goal.of_ratio(f"first token, {name}, {PRUNED}, by {HUGGING_FACE}", goal, pruned(by_hugging_face))]
    if own_goal is not None:
        goals.append(Goal.of_ratio(f"first token, {name}, {PRUNED}, by our own unpruned", own_goal, by_ours))
    return Measured({title: rows for title, rows in tables.items() if rows}, {"answers": found, "peaks": peaks}, goals)


def our_systems(
    bench: Bench, workspace: Workspace, arguments: Mapping[str, Any]
) -> tuple[list[System], dict[str, Path]]:
    """Our bundles with the language model in each of LANGUAGES, one process each; and the bundle of each row."""
    systems, bundles = [], {}
    opened = bench.variants(workspace)
    for way, is_compiled in LANGUAGES.items():
        language = Language(workspace.checkpoint, bench.device, is_compiled)
        variants = [replace(variant, name=f"{variant.name}, {way}") for variant in opened]
        bundles |= {variant.name: variant.bundle for variant in variants}
        given = {**arguments, "variants": variants, "language": language}
        systems.append(System(f"our bundles, {way}", open_warm, given, is_optional=True))
    return systems, bundles


def measure_throughput(bench: Bench) -> Measured:
    """Output tokens per second of batches."""
    workspace = bench.workspace("llava-1.5")
    asked = {"batch_size": BATCH_SIZE, "num_new_tokens": BATCH_TOKENS}
    model = {"open_system": throughput.open_hugging_face, "checkpoint": workspace.checkpoint, "device": bench.device}
    ours, bundles = our_systems(bench, workspace, {"open_system": open_batches, **asked})
    found, floors, peaks = bench.measure([System(HUGGING_FACE, open_warm, {**model, **asked}), *ours], workspace)
    precision = LANGUAGE_PRECISIONS[bench.device]
    by_name = {}
    for name, bundle in bundles.items():
        if name in found.samples:
            # An answer may end before all its tokens.
            num_new_tokens = int(min(found.values(name, "num_new_tokens"))) // BATCH_SIZE
            by_name[name] = floors.batch_ms(bundle, precision, BATCH_SIZE, num_new_tokens)
    rows = [Row.of(found, name, "batch_ms", HUGGING_FACE, floor_ms=by_name.get(name)) for name in found.samples]
    goal = Goal(f"output tokens per second, batch {BATCH_SIZE}, {PRUNED}, by {HUGGING_FACE}", 1.6, None)
    base = found.values(HUGGING_FACE, "tokens_per_s")
    for row in pruned(rows):
        rates = zip(found.values(row.label, "tokens_per_s"), base, strict=True)
        ratio = median(rate / other for rate, other in rates)
        if goal.found is None or ratio > goal.found:
            goal = replace(goal, found=ratio, system=row.label, over_floor=row.over_floor)
    title = f"time of a batch of {BATCH_SIZE}, {BATCH_TOKENS} tokens out"
    return Measured({title: rows}, {"throughput": found, "peaks": peaks}, [replace(goal, sense="at least")])


def pruned(rows: Sequence[Row]) -> list[Row]:
    """Those of our pruned bundle."""
    return [row for row in rows if row.label.startswith(PRUNED)]


PARTS: Mapping[str, Callable[[Bench], Measured]] = {
    "vision": measure_vision,
    "kernel": measure_kernel,
    "llava-1.5": partial(
        measure_answers, name="llava-1.5", family="llava", picture_size=ttft.PICTURE_SIZE, goal=0.35, own_goal=0.50
    ),
    # A picture that becomes 5 tiles.
    "llava-next": partial(
        measure_answers, name="llava-next", family="llava_next", picture_size=PICTURE_SIZE, goal=0.30, own_goal=None
    ),
    "throughput": measure_throughput,
}


def run(options: argparse.Namespace, device: str) -> None:
    """Measure parts; each is written when it is done, beside those that the file holds already."""
    bench = Bench(options, device)
    goals: list[dict[str, Any]] = []
    for name in options.only:
        print(f"\n{name}", flush=True)
        found = PARTS[name](bench)
        print("\n" + "\n\n".join(table(title, rows) for title, rows in found.tables.items()))
        part_goals = [goal.to_dict() for goal in found.goals]
        write_part(options.output, name, measured(options, found.tables, found.results) | {"goals": part_goals})
        goals += part_goals
    print(f"\n{text(goal_table(goals))}\n\nall samples: {options.output}")


def write_part(output: Path, name: str, found: Mapping[str, Any]) -> None:
    """Put a part into the file of results, in the place of an older one."""
    written = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"parts": {}}
    written["parts"][name] = found
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json.dumps(written, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser, OUTPUT, "7b", num_threads=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device that PyTorch sees, and this is measured on a GPU only.")
    run(options, "cuda")


if __name__ == "__main__":
    main()
