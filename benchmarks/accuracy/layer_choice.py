"""What the criteria of `hivtp layers` are worth: `python -m benchmarks.accuracy.layer_choice`.

Each criterion ranks layer ranges on calibration pictures without labels. The labels of held-out pictures then say how
many answers are right with each range, and how many of the kept patches show something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.miniature.layers import foreground_share
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import CALIBRATION, HELD_OUT, draw
from benchmarks.timing.table import aligned
from hivtp.export.layers.choice import choose_layers
from hivtp.export.layers.ranking import ChoiceSettings, Criterion
from hivtp.export.settings import ExportSettings
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hivtp.export.layers.ranking import LayerRange, LayerRanking

# Shares of the miniature's 144 patches, and the rules that keep them.
RULES = {
    "50 %": PruningSpec(keep=72),
    "25 %": PruningSpec(window=3, global_ratio=5 / 36, keep=36),
    "11 %": PruningSpec.preset("64", (12, 12)),
}
# They fit every picture, whatever is on it.
QUESTIONS = ("How many shapes are there?", "What number is shown?", "Is there a red circle?", "Where is the circle?")


def rank(checkpoint: Path, spec: PruningSpec, criterion: Criterion, files: Sequence[Path]) -> LayerRanking:
    """The ranking that a user gets for these picture files."""
    settings = ChoiceSettings(criterion, QUESTIONS, max_answer_tokens=3)
    return choose_layers(checkpoint, files, ExportSettings(spec=spec), settings, is_quiet=True)


def kept_by(evaluation: Evaluation, layers: LayerRange, spec: PruningSpec) -> NDArray[np.int64]:
    """What a rule keeps of the held-out pictures with these scoring layers: [pictures, kept]."""
    scoring = np.s_[layers.first_layer : layers.first_layer + layers.num_layers]
    return select(evaluation.encoded.received[:, scoring].mean(axis=1), evaluation.encoded.grid, spec).indices


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def measure(checkpoint: Path, num_files: int, num_held_out: int) -> dict[str, Any]:
    """Rank with each rule and criterion on calibration pictures, and compare with the labels of held-out ones."""
    evaluation = Evaluation.open(checkpoint, HELD_OUT[:num_held_out])
    every_patch = np.tile(np.arange(evaluation.encoded.foreground.shape[1]), (num_held_out, 1))
    found: dict[str, Any] = {
        "unpruned_accuracy": float(evaluation.is_right(every_patch).mean()),
        "pictures": num_files,
        "held_out": num_held_out,
        "questions": QUESTIONS,
        "rules": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{seed}.png" for seed in CALIBRATION[:num_files]]
        for file in files:
            draw(int(file.stem)).image.save(file)
        for name, spec in RULES.items():
            rankings = {criterion: rank(checkpoint, spec, criterion, files) for criterion in get_args(Criterion)}
            found["rules"][name] = compare(evaluation, spec, rankings)
    return found


def compare(evaluation: Evaluation, spec: PruningSpec, rankings: Mapping[str, LayerRanking]) -> dict[str, Any]:
    """The rankings of one rule beside what the labels say of every range, and what each way of choosing comes to."""
    costs = {
        criterion: {layers: judged.cost for layers, judged in ranking.ranges} for criterion, ranking in rankings.items()
    }
    ranges = sorted(next(iter(costs.values())), key=lambda layers: (layers.num_layers, layers.first_layer))
    kept = {layers: kept_by(evaluation, layers, spec) for layers in ranges}
    accuracy = {layers: float(evaluation.is_right(kept[layers]).mean()) for layers in ranges}
    recall = {layers: foreground_share(evaluation.encoded.foreground, kept[layers]) for layers in ranges}

    def correlation(criterion: str, worth: Mapping[LayerRange, float]) -> float:
        # A low cost is to go with much that is right.
        return rank_correlation([-costs[criterion][layers] for layers in ranges], [worth[layers] for layers in ranges])

    choices: dict[str, dict[str, Any]] = {
        criterion: {
            "layers": str(ranking.best),
            "accuracy": accuracy[ranking.best],
            "correlation_with_accuracy": correlation(criterion, accuracy),
            "correlation_with_recall": correlation(criterion, recall),
        }
        for criterion, ranking in rankings.items()
    }
    others = {
        "default": next(iter(rankings.values())).default,
        "labels of the patches": max(ranges, key=recall.__getitem__),
        "best there is": max(ranges, key=accuracy.__getitem__),
        "worst there is": min(ranges, key=accuracy.__getitem__),
    }
    choices |= {name: {"layers": str(layers), "accuracy": accuracy[layers]} for name, layers in others.items()}
    rows = [
        {"layers": str(layers), "accuracy": accuracy[layers], "recall": recall[layers]}
        | {criterion: values[layers] for criterion, values in costs.items()}
        for layers in ranges
    ]
    return {"ranges": rows, "choices": choices}


def table(found: Mapping[str, Any]) -> str:
    """The ranges and choices of every rule."""
    chosen_by, measured_on = found["pictures"], found["held_out"]
    parts = [
        f"unpruned accuracy {found['unpruned_accuracy']:.1%}; {chosen_by} pictures to choose by, {measured_on} others"
    ]
    for name, rule in found["rules"].items():
        ranges = [["layers", "accuracy", "foreground", "cost in answers", "cost in features"]]
        for row in rule["ranges"]:
            shares, costs = (row["accuracy"], row["recall"]), (row["answers"], row["features"])
            ranges.append([row["layers"], *(f"{value:.1%}" for value in shares), *(f"{value:.4f}" for value in costs)])
        choices = [["chosen by", "layers", "accuracy", "rank correlation with accuracy", "with foreground"]]
        for choice, values in rule["choices"].items():
            correlations = (values.get(f"correlation_with_{worth}") for worth in ("accuracy", "recall"))
            cells = ("" if value is None else f"{value:+.2f}" for value in correlations)
            choices.append([choice, values["layers"], f"{values['accuracy']:.1%}", *cells])
        parts.append(f"{name} of the patches\n{aligned(ranges)}\n\n{aligned(choices)}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a trained miniature (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20, help="that layers are chosen by (%(default)s)")
    parser.add_argument("--held-out", type=int, default=300, help="that accuracy is measured on (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args(arguments)
    found = measure(options.checkpoint, options.pictures, options.held_out)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
