"""Whether bundles keep and answer what PyTorch does, on the miniature: `python -m benchmarks.accuracy.parity`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.curves import HALF, add_options, prepare
from benchmarks.accuracy.evaluation import MAX_ANSWER
from benchmarks.accuracy.intervals import Bootstrap, Goal, Score, goal_table, with_margin
from benchmarks.accuracy.rivals import Hivtp
from benchmarks.pipelines import load_pipeline
from benchmarks.timing.record import write
from benchmarks.timing.table import aligned
from benchmarks.timing.workspace import WORK_DIR, Workspace
from hivtp import SamplingParams
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from benchmarks.accuracy.calibration import LayerRange
    from benchmarks.accuracy.evaluation import Evaluation
    from benchmarks.miniature.pictures import Picture
    from benchmarks.timing.table import Table
    from hivtp_ops import PruningSpec

PYTORCH, PYTORCH_UNPRUNED = "PyTorch fp32", "PyTorch fp32, unpruned"
FP32, INT8, INT8_INT4 = "bundle fp32 / fp32", "bundle int8 / fp32", "bundle int8 / int4"
PREFILL = "bundle int8 / int4, prefill in w8a8"
UNPRUNED = "bundle fp32 / fp32, unpruned"


@dataclass(frozen=True)
class Run:
    """What one system kept and answered.

    Attributes:
        kept: raster indices of each picture's kept patches.
        answers: by picture and question.
    """

    kept: Sequence[Sequence[int]]
    answers: Sequence[Sequence[str]]

    def says(self, answers: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
        """Whether each answer is this one, word for word: [pictures, kinds]."""
        is_same: NDArray[np.bool_] = np.array(self.answers, dtype=object) == np.array(answers, dtype=object)
        return is_same

    def is_right(self, pictures: Sequence[Picture]) -> NDArray[np.bool_]:
        """Whether each answer is exactly the right one: [pictures, kinds]."""
        return self.says([[question.answer for question in picture.questions] for picture in pictures])


def bundles(spec: PruningSpec) -> dict[str, ExportSettings]:
    """What is exported, by name: vision / language precision."""
    return {
        FP32: ExportSettings(spec=spec),
        INT8: ExportSettings(spec=spec, vision_precision="int8"),
        INT8_INT4: ExportSettings(spec=spec, vision_precision="int8", language_precision="int4"),
        PREFILL: ExportSettings(
            spec=spec, vision_precision="int8", language_precision="int4", prefill_precision="w8a8"
        ),
        UNPRUNED: ExportSettings(is_pruned=False),
    }


def run_pytorch(evaluation: Evaluation, rule: Hivtp, count: int) -> Run:
    """Select and answer in PyTorch, float32."""
    kept = rule(evaluation.encoded, count)
    return Run([picture[picture >= 0].tolist() for picture in kept], evaluation.answers(kept))


def run_bundle(folder: Path, pictures: Sequence[Picture], num_threads: int) -> Run:
    """Answer every question with the pipeline, one by one, as a user would."""
    sampling, kept, answers = SamplingParams(max_new_tokens=MAX_ANSWER), [], []
    with load_pipeline(folder, num_threads) as pipeline:
        for picture in pictures:
            given = [pipeline.generate(question.text, [picture.image], sampling) for question in picture.questions]
            kept.append(given[0].kept_indices[0])
            answers.append([answer.text for answer in given])
    return Run(kept, answers)


def goals(runs: Mapping[str, Run], pictures: Sequence[Picture], bootstrap: Bootstrap) -> list[Goal]:
    """What the bundles are held to."""
    reference, exported = runs[PYTORCH], runs[FP32]
    kept = np.array([list(ours) == list(theirs) for ours, theirs in zip(exported.kept, reference.kept, strict=True)])
    answers = exported.says(reference.answers)
    right = {name: run.is_right(pictures).astype(np.float64) for name, run in runs.items()}
    return [
        Goal("pictures of which the bundle keeps what PyTorch keeps", bootstrap.score(kept), "at least", 100.0),
        Goal("answers that are PyTorch's, word for word", bootstrap.score(answers), "at least", 99.5),
        Goal("points that int8 vision loses against fp32", bootstrap.score(right[FP32] - right[INT8]), "at most", 1.0),
    ]


@dataclass(frozen=True)
class Row:
    """One system beside PyTorch.

    Attributes:
        accuracy: right answers.
        kept_alike: patches that both keep, among those that one of them keeps; mean over pictures, in percent.
        widest_swap: where they keep others, by how much the importance of these differs, as a share of the mean
            importance; the largest over pictures. Rounding swaps only patches whose scores are all but equal.
        same_answers: answers that are PyTorch's, in percent.
    """

    accuracy: Score
    kept_alike: float
    widest_swap: float
    same_answers: float


def compare(
    run: Run, reference: Run, pictures: Sequence[Picture], importance: NDArray[np.float32], bootstrap: Bootstrap
) -> Row:
    """Compare a system with PyTorch, whose scores are `importance` [pictures, patches]."""
    alike, swaps = [], [0.0]
    for ours, theirs, scores in zip(run.kept, reference.kept, importance, strict=True):
        alike.append(len({*ours} & {*theirs}) / len({*ours} | {*theirs}))
        if swapped := sorted({*ours} ^ {*theirs}):
            swaps.append(float(np.ptp(scores[swapped]) / scores.mean()))
    same_answers = 100 * float(run.says(reference.answers).mean())
    return Row(bootstrap.score(run.is_right(pictures)), 100 * float(np.mean(alike)), max(swaps), same_answers)


def table(systems: Mapping[str, Mapping[str, Any]]) -> Table:
    """Bundles beside PyTorch, from the plain values of their rows."""
    rows = [["", "right, percent", "kept alike, percent", "widest swap", "same answers, percent"]]
    for name, row in systems.items():
        alike, swap, same = f"{row['kept_alike']:.3f}", f"{row['widest_swap']:.2g}", f"{row['same_answers']:.2f}"
        rows.append([name, with_margin(row["accuracy"]), alike, swap, same])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, answer and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "parity.json")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="keeps the bundles between runs")
    options = parser.parse_args(arguments)
    evaluation, calibration = prepare(options)
    layers = calibration.best
    rule = Hivtp(layers.first_layer, layers.num_layers)
    num_patches = evaluation.encoded.foreground.shape[1]
    count = round(HALF * num_patches)
    # A bundle is known by its folder, so what decides the spec is part of it.
    workspace = Workspace(options.work_dir / "parity" / f"{layers}, {count}", options.checkpoint)
    runs = {PYTORCH: run_pytorch(evaluation, rule, count), PYTORCH_UNPRUNED: run_pytorch(evaluation, rule, num_patches)}
    for name, settings in bundles(rule.spec(count, evaluation.encoded.grid)).items():
        folder = workspace.bundle(name, settings)
        print(f"  asking {name}", flush=True)
        runs[name] = run_bundle(folder, evaluation.pictures, options.threads)
    report(options, evaluation, layers, count, runs)


def report(
    options: argparse.Namespace, evaluation: Evaluation, layers: LayerRange, count: int, runs: Mapping[str, Run]
) -> None:
    """Print the table and the goals, and write them."""
    pictures, bootstrap = evaluation.pictures, Bootstrap(len(evaluation.pictures))
    scoring = np.s_[layers.first_layer : layers.first_layer + layers.num_layers]
    importance = evaluation.encoded.received[:, scoring].mean(axis=1)
    systems = {}
    for name, run in runs.items():
        reference = runs[PYTORCH_UNPRUNED if name in (UNPRUNED, PYTORCH_UNPRUNED) else PYTORCH]
        systems[name] = asdict(compare(run, reference, pictures, importance, bootstrap))
    found: dict[str, Any] = {
        "num_pictures": len(pictures),
        "num_questions": evaluation.question_lengths.numel(),
        "num_kept": count,
        "layers": asdict(layers),
        "systems": systems,
        "goals": [goal.to_dict() for goal in goals(runs, pictures, bootstrap)],
    }
    write(options, found)
    print(f"\n{len(pictures)} held-out pictures, {found['num_questions']} questions; HIVTP by {layers}, {count} tokens")
    print(f"\n{aligned(table(systems))}\n\n{aligned(goal_table(found['goals']))}")


if __name__ == "__main__":
    main()
