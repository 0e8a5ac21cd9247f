"""Accuracy over the number of tokens, HIVTP beside other rules: `python -m benchmarks.accuracy.curves`.

Every rule chooses among the same features of the miniature, and its questions are answered on what it keeps. The
miniature was trained with patches dropped in half of its batches, so it forgives pruning more than a checkpoint that
never saw that: compare the rules with each other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.ablation import ablate, ablation_table
from benchmarks.accuracy.calibration import Calibration, calibrate, range_name
from benchmarks.accuracy.comparison import HIVTP, UNPRUNED, Comparison, Result
from benchmarks.accuracy.evaluation import Exam
from benchmarks.accuracy.intervals import Bootstrap, Goal
from benchmarks.accuracy.rivals import Hivtp, Rule, all_rules
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import CALIBRATION, HELD_OUT
from benchmarks.timing.harness import environment
from benchmarks.timing.record import portable_settings
from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Of all patches, down to 6 %: on 12 x 12 these are 108, 72, 48, 36, 24, 16 and 9.
SHARES = (3 / 4, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 9, 1 / 16)
HALF, QUARTER, NINTH = SHARES[1], SHARES[3], SHARES[5]

NO_EVIDENCE = (
    "The adversary answers: patches that show nothing tell what is shown, since the tower has spread it over all of "
    "them.\nSuch a model is no evidence for or against a rule."
)


def run(exam: Exam, name: str, rule: Rule, count: int) -> Result:
    """Let a rule choose, and ask all questions."""
    kept = rule(exam.encoded, count)
    owners = np.stack([picture.owners for picture in exam.pictures])
    is_kept = np.zeros(owners.shape, dtype=np.bool_)
    pictures, places = np.nonzero(kept >= 0)
    is_kept[pictures, kept[pictures, places]] = True
    is_of_thing = owners == np.arange(owners.max() + 1)[:, None, None]
    is_there, is_seen = is_of_thing.any(axis=2), (is_of_thing & is_kept).any(axis=2)
    is_foreground = exam.encoded.foreground
    return Result(
        rule=name,
        count=count,
        num_kept=float(is_kept.sum(axis=1).mean()),
        foreground_kept=100 * float((is_kept & is_foreground).sum() / is_foreground.sum()),
        things_kept=100 * float(is_seen.sum() / is_there.sum()),
        is_right=exam.is_right(kept),
    )


def evaluate(exam: Exam, rules: Mapping[str, Rule], shares: Sequence[float] = SHARES) -> Comparison:
    """Every rule at every share of the patches, and all patches."""
    num_pictures, num_patches = exam.encoded.foreground.shape
    every_patch = np.tile(np.arange(num_patches), (num_pictures, 1))
    results = [run(exam, UNPRUNED, lambda _encoded, _count: every_patch, num_patches)]
    for name, rule in rules.items():
        started = time.perf_counter()
        results += [run(exam, name, rule, round(share * num_patches)) for share in shares]
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return Comparison(results, Bootstrap(num_pictures))


def goals(results: Comparison) -> list[Goal]:
    """What HIVTP and the adversary are held to."""
    num_patches = results.num_patches
    half, quarter = round(HALF * num_patches), round(QUARTER * num_patches)
    return [
        Goal(
            f"points that HIVTP loses with {half} of {num_patches} tokens",
            results.lead(UNPRUNED, HIVTP, half),
            "at most",
            1.5,
        ),
        Goal(
            f"points by which HIVTP leads random with {quarter} tokens",
            results.lead(HIVTP, "random", quarter),
            "at least",
            15.0,
        ),
        Goal(f"accuracy of the adversary with {half} tokens", results.score("adversary", half), "at most", 35.0),
    ]


def rules_for(exam: Exam, calibration: Calibration) -> dict[str, Rule]:
    """Every rule with its layers calibrated, and HIVTP once more with those that an export takes by itself."""
    best = calibration.best
    return {
        **all_rules(best.first_layer, best.num_layers, calibration.object_layer),
        "HIVTP, default layers": Hivtp(*default_layers(exam)),
    }


def default_layers(exam: Exam) -> tuple[int, int]:
    """First layer and number of layers that an export takes by itself: the paper's, scaled to the tower's depth."""
    spec = PruningSpec().resolve(exam.model.config.vision_config.num_hidden_layers)
    assert spec.first_layer is not None, "resolve sets the layers"
    assert spec.num_layers is not None, "resolve sets the layers"
    return spec.first_layer, spec.num_layers


def report(options: argparse.Namespace, exam: Exam, calibration: Calibration, results: Comparison) -> None:
    """Print the tables and the goals, and write everything."""
    found, reached = environment(options.threads), goals(results)
    num_questions = exam.question_lengths.numel()
    written: dict[str, Any] = {
        "environment": found,
        "settings": portable_settings(options),
        "num_pictures": len(exam.pictures),
        "num_questions": num_questions,
        "num_patches": results.num_patches,
        "calibration": calibration.to_dict(),
        "default_layers": default_layers(exam),
        "results": results.to_dicts(),
        "goals": [goal.to_dict() for goal in reached],
    }
    print("\n".join(f"{key}: {value}" for key, value in found.items()))
    print(
        f"\n{len(exam.pictures)} held-out pictures, {num_questions} questions; +- is half a 95 % interval, the widest"
    )
    print(
        f"layers by {calibration.num_pictures} other pictures: HIVTP {calibration.best}, "
        f"HiPrune's object layer {calibration.object_layer}; by default HIVTP takes {range_name(*default_layers(exam))}"
    )
    for kind in (None, "number"):
        print(f"\n{results.table(kind)}\n\n{results.leads_table(kind)}")
    for share in (HALF, QUARTER, NINTH):
        print(f"\n{results.kinds_table(round(share * results.num_patches))}")
    if options.ablation:
        written["ablation"] = ablate(exam, calibration.best)
        print(f"\n{ablation_table(written['ablation'])}")
    print("\n" + "\n".join(map(str, reached)))
    if not reached[-1].is_reached:
        print(NO_EVIDENCE)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"\nall results: {options.output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate, measure and report."""
    parser = argparse.ArgumentParser(description="Accuracy over the number of tokens, HIVTP beside other rules.")
    add_options(parser, "accuracy.json")
    parser.add_argument("--ablation", action="store_true", help="also vary each setting of HIVTP by itself")
    options = parser.parse_args(arguments)
    exam, calibration = prepare(options)
    report(options, exam, calibration, evaluate(exam, rules_for(exam, calibration)))


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options that the scripts share."""
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the miniature (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures (default: %(default)s)")
    parser.add_argument(
        "--calibration-pictures", type=int, default=300, help="others, to choose layers with (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(output), help="results as JSON (default: %(default)s)")


def prepare(options: argparse.Namespace) -> tuple[Exam, Calibration]:
    """Choose layers with the calibration pictures, and encode the held-out ones."""
    import torch

    torch.set_num_threads(options.threads)
    print("  calibrating", flush=True)
    calibration = calibrate(Exam.open(options.checkpoint, CALIBRATION[: options.calibration_pictures]))
    return Exam.open(options.checkpoint, HELD_OUT[: options.pictures]), calibration


if __name__ == "__main__":
    main()
