"""What the criteria of `hivtp-export --choose-layers` are worth: against what the labels of the miniature say."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from benchmarks.miniature.pictures import CALIBRATION, HELD_OUT, draw
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.graph.clip import VisionShape
from hivtp.export.layers.choice import choose_layers
from hivtp.export.layers.criteria import AnswerCriterion
from hivtp.export.layers.ranking import ChoiceSettings, Criterion, LayerRange
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.reference import language_reference, vision_reference
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.miniature.pictures import Picture
    from hivtp.export.layers.ranking import LayerRanking

CHECKPOINT = Path(__file__).parent / "miniature" / "checkpoint"
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


class Truth:
    """What the labels of held-out pictures say of a layer range.

    Args:
        folder: the trained miniature.
        pictures: to measure on.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture]) -> None:
        self.checkpoint = Checkpoint.open(folder)
        processor, shape = Processor.open(self.checkpoint), VisionShape.of(self.checkpoint.config)
        self.grid = shape.grid
        every_layer = PruningSpec(first_layer=0, num_layers=shape.num_feature_layers)
        pixel_values = processor.pixel_values([picture.image for picture in pictures])
        tower = vision_reference(self.checkpoint, every_layer, pixel_values)
        assert tower.layer_importance is not None, "every layer scores"
        self.scores = tower.layer_importance
        self.is_foreground = np.stack([picture.foreground for picture in pictures])

        tokenizer = processor.tokenizer
        judge = AnswerCriterion(self.checkpoint, [tokenizer.eos_token_id], max_answer_tokens=3)
        self.questions = [
            (
                number,
                judge.prompt(processor.question_ids(question.text), tower.embeds[number], 0),
                [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
            )
            for number, picture in enumerate(pictures)
            for question in picture.questions
        ]

    def recall(self, layers: LayerRange, spec: PruningSpec) -> float:
        """Kept patches that show something, as a share of the most that the rule could keep."""
        kept = self._kept(layers, spec)
        num_shown = np.take_along_axis(self.is_foreground, kept, axis=1).sum()
        return float(num_shown / np.minimum(self.is_foreground.sum(axis=1), kept.shape[1]).sum())

    def accuracy(self, layers: LayerRange | None, spec: PruningSpec) -> float:
        """Share of the questions that are answered right, greedily, from the kept patches; None keeps all."""
        kept = None if layers is None else self._kept(layers, spec)
        table = self.checkpoint.language_tensor("model.embed_tokens.weight").float().numpy()
        sequences = [
            prompt.embeds(None if kept is None else kept[picture], table[answer[:-1]])
            for picture, prompt, answer in self.questions
        ]
        config, read = self.checkpoint.config.text_config, self.checkpoint.language_tensor
        logits = language_reference(config, read, sequences, [len(answer) for _, _, answer in self.questions])
        # Where every token before it was right, greedy decoding has written the same.
        return float(
            np.mean(
                [
                    found.argmax(axis=1).tolist() == answer
                    for found, (_, _, answer) in zip(logits, self.questions, strict=True)
                ]
            )
        )

    def _kept(self, layers: LayerRange, spec: PruningSpec) -> NDArray[np.int64]:
        last = layers.first_layer + layers.num_layers
        return select(self.scores[layers.first_layer : last].mean(axis=0), self.grid, spec).indices


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def measure(checkpoint: Path, num_files: int, num_held_out: int) -> dict[str, Any]:
    """Rank with each rule and criterion on calibration pictures, and compare with the labels of held-out ones."""
    truth = Truth(checkpoint, [draw(seed) for seed in HELD_OUT[:num_held_out]])
    unpruned = truth.accuracy(None, PruningSpec())
    found: dict[str, Any] = {
        "unpruned_accuracy": unpruned,
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
            found["rules"][name] = _measure_rule(checkpoint, spec, files, truth)
    return found


def _measure_rule(checkpoint: Path, spec: PruningSpec, files: Sequence[Path], truth: Truth) -> dict[str, Any]:
    rankings = {criterion: rank(checkpoint, spec, criterion, files) for criterion in get_args(Criterion)}
    costs = {
        criterion: {layers: judgement.cost for layers, judgement in ranking.ranges}
        for criterion, ranking in rankings.items()
    }
    ranges = sorted(next(iter(costs.values())), key=lambda layers: (layers.num_layers, layers.first_layer))
    accuracy = {layers: truth.accuracy(layers, spec) for layers in ranges}
    recall = {layers: truth.recall(layers, spec) for layers in ranges}
    # A low cost is to go with much that is right.
    worth = {"accuracy": accuracy, "recall": recall}
    rows = [
        {"layers": str(layers), "accuracy": accuracy[layers], "recall": recall[layers]}
        | {criterion: values[layers] for criterion, values in costs.items()}
        for layers in ranges
    ]
    summary = {
        criterion: {
            "layers": str(ranking.best),
            "accuracy": accuracy[ranking.best],
            "is_significant": ranking.is_significant,
            **{
                f"correlation_with_{label}": rank_correlation(
                    [-costs[criterion][layers] for layers in ranges], [values[layers] for layers in ranges]
                )
                for label, values in worth.items()
            },
        }
        for criterion, ranking in rankings.items()
    }
    default = next(iter(rankings.values())).default
    by_recall = max(ranges, key=lambda layers: recall[layers])
    summary["default"] = {"layers": str(default), "accuracy": accuracy[default]}
    summary["labels of the patches"] = {"layers": str(by_recall), "accuracy": accuracy[by_recall]}
    summary["best there is"] = {"accuracy": max(accuracy.values())}
    summary["worst there is"] = {"accuracy": min(accuracy.values())}
    return {"ranges": rows, "choices": summary}


def table(found: dict[str, Any]) -> str:
    """The choices of every rule, for people."""
    lines = [f"unpruned accuracy {found['unpruned_accuracy']:.1%}"]
    lines += [
        f"{found['pictures']} pictures to choose by, accuracy on {found['held_out']} others with 7 questions each"
    ]
    for name, rule in found["rules"].items():
        lines.append(f"\n{name} of the patches")
        lines += [
            f"  {row['layers']:<6} accuracy {row['accuracy']:6.1%}  foreground {row['recall']:6.1%}  "
            f"answers {row['answers']:.4f}  features {row['features']:.4f}"
            for row in rule["ranges"]
        ]
        for choice, values in rule["choices"].items():
            text = f"  by {choice:<22} {values.get('layers', ''):<6} accuracy {values['accuracy']:6.1%}"
            if "correlation_with_accuracy" in values:
                text += f"  rank correlation {values['correlation_with_accuracy']:+.2f} with accuracy, "
                text += f"{values['correlation_with_recall']:+.2f} with foreground"
            lines.append(text)
    return "\n".join(lines)


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a trained miniature (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20, help="that layers are chosen by (%(default)s)")
    parser.add_argument("--held-out", type=int, default=300, help="that accuracy is measured on (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()
    found = measure(options.checkpoint, options.pictures, options.held_out)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
