"""Accuracy over the number of tokens, HIVTP beside other rules: `python -m benchmarks.accuracy`.

Every rule chooses among the same features of the miniature, and its questions are answered on what it keeps. The
miniature was trained with patches dropped in half of its batches, so it forgives pruning more than a checkpoint that
never saw that: compare the rules with each other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.ablation import ablate, ablation_tables
from benchmarks.accuracy.calibration import Calibration, calibrate, range_name
from benchmarks.accuracy.comparison import (
    HIVTP,
    UNPRUNED,
    Comparison,
    Result,
    accuracy_table,
    kinds_table,
    leads_table,
)
from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.accuracy.intervals import Bootstrap, Goal, goal_table
from benchmarks.accuracy.rivals import Hivtp, Rule, all_rules
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import CALIBRATION, HELD_OUT
from benchmarks.timing.record import write
from benchmarks.timing.table import aligned
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


def result_of(evaluation: Evaluation, name: str, rule: Rule, count: int) -> Result:
    """Let a rule choose, and ask all questions."""
    kept = rule(evaluation.encoded, count)
    owners = np.stack([picture.owners for picture in evaluation.pictures])
    is_kept = np.zeros(owners.shape, dtype=np.bool_)
    pictures, places = np.nonzero(kept >= 0)
    is_kept[pictures, kept[pictures, places]] = True
    is_of_thing = owners == np.arange(owners.max() + 1)[:, None, None]
    is_there, is_seen = is_of_thing.any(axis=2), (is_of_thing & is_kept).any(axis=2)
    is_foreground = evaluation.encoded.foreground
    return Result(
        rule=name,
        count=count,
        num_kept=float(is_kept.sum(axis=1).mean()),
        foreground_kept=100 * float((is_kept & is_foreground).sum() / is_foreground.sum()),
        things_kept=100 * float(is_seen.sum() / is_there.sum()),
        is_right=evaluation.is_right(kept),
    )


def compare(evaluation: Evaluation, rules: Mapping[str, Rule], shares: Sequence[float] = SHARES) -> Comparison:
    """Every rule at every share of the patches, and all patches."""
    num_pictures, num_patches = evaluation.encoded.foreground.shape
    every_patch = np.tile(np.arange(num_patches), (num_pictures, 1))
    results = [result_of(evaluation, UNPRUNED, lambda _encoded, _count: every_patch, num_patches)]
    for name, rule in rules.items():
        started = time.perf_counter()
        results += [result_of(evaluation, name, rule, round(share * num_patches)) for share in shares]
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


def rules_for(evaluation: Evaluation, calibration: Calibration) -> dict[str, Rule]:
    """Every rule with its layers calibrated, and HIVTP once more with those that an export takes by itself."""
    best = calibration.best
    return {
        **all_rules(best.first_layer, best.num_layers, calibration.object_layer),
        "HIVTP, default layers": Hivtp(*default_layers(evaluation)),
    }


def default_layers(evaluation: Evaluation) -> tuple[int, int]:
    """First layer and number of layers that an export takes by itself: the paper's, scaled to the tower's depth."""
    spec = PruningSpec().resolve(evaluation.model.config.vision_config.num_hidden_layers)
    assert spec.first_layer is not None, "resolve sets the layers"
    assert spec.num_layers is not None, "resolve sets the layers"
    return spec.first_layer, spec.num_layers


def report(
    options: argparse.Namespace, evaluation: Evaluation, calibration: Calibration, comparison: Comparison
) -> None:
    """Print the tables and the goals, and write everything."""
    results, reached = comparison.to_dicts(), goals(comparison)
    found: dict[str, Any] = {
        "num_pictures": len(evaluation.pictures),
        "num_questions": evaluation.question_lengths.numel(),
        "num_patches": comparison.num_patches,
        "calibration": calibration.to_dict(),
        "default_layers": default_layers(evaluation),
        "results": results,
        "goals": [goal.to_dict() for goal in reached],
    }
    if options.ablation:
        found["ablation"] = ablate(evaluation, calibration.best)
    write(options, found)
    whole = comparison.score(UNPRUNED, comparison.num_patches)
    print(
        f"\n{found['num_pictures']} held-out pictures, {found['num_questions']} questions; percent right, with half a "
        f"95 % interval; unpruned, {comparison.num_patches} tokens: {whole}\n"
        f"layers by {calibration.num_pictures} other pictures: HIVTP {calibration.best}, "
        f"HiPrune's object layer {calibration.object_layer}; "
        f"by default HIVTP takes {range_name(*default_layers(evaluation))}"
    )
    for kind in ("all", "number"):
        print(f"\nquestions: {kind}\n{aligned(accuracy_table(results, kind))}\n\n{aligned(leads_table(results, kind))}")
    for share in (HALF, QUARTER, NINTH):
        print(f"\n{aligned(kinds_table(results, round(share * comparison.num_patches)))}")
    for table in ablation_tables(found.get("ablation", [])):
        print(f"\n{aligned(table)}")
    print(f"\n{aligned(goal_table(found['goals']))}")
    if not reached[-1].is_reached:
        print(NO_EVIDENCE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "accuracy.json")
    parser.add_argument("--ablation", action="store_true", help="also vary each setting of HIVTP by itself")
    options = parser.parse_args(arguments)
    evaluation, calibration = prepare(options)
    report(options, evaluation, calibration, compare(evaluation, rules_for(evaluation, calibration)))


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options that the scripts share."""
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the miniature (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures (default: %(default)s)")
    parser.add_argument(
        "--calibration-pictures", type=int, default=300, help="others, to choose layers with (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(output), help="results as JSON (default: %(default)s)")


def prepare(options: argparse.Namespace) -> tuple[Evaluation, Calibration]:
    """Choose layers with the calibration pictures, and encode the held-out ones."""
    import torch

    torch.set_num_threads(options.threads)
    print("  calibrating", flush=True)
    calibration = calibrate(Evaluation.open(options.checkpoint, CALIBRATION[: options.calibration_pictures]))
    return Evaluation.open(options.checkpoint, HELD_OUT[: options.pictures]), calibration
