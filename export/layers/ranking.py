"""A ranking of layer ranges: its settings, its results, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp_ops.spec import PruningSpec

Criterion = Literal["answers", "features"]
# Ranges in the table; `to_dict` has all.
NUM_ROWS = 12


@dataclass(frozen=True)
class ChoiceSettings:
    """How layer ranges are scored.

    Attributes:
        criterion: "answers" by how much the answers of the language model change, "features" by how much of the
            differences between tokens is dropped; see `hivtp.export.layers.criteria`.
        questions: asked about every image; the features need none.
        max_answer_tokens: at most this many tokens of an answer are compared.

    Raises:
        SpecError: there is no such criterion, or nothing to ask, or no answer to judge.
    """

    criterion: Criterion = "answers"
    questions: tuple[str, ...] = ("What is in the image?",)
    max_answer_tokens: int = 16

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise SpecError(f"criterion is {self.criterion!r}; choose one of {', '.join(get_args(Criterion))}")
        if not all(question.strip() for question in self.questions) or not self.questions:
            raise SpecError("a question is empty; write a question that can be asked about every image")
        if self.max_answer_tokens < 1:
            raise SpecError(f"max_answer_tokens must be 1 or more, not {self.max_answer_tokens}")


@dataclass(frozen=True)
class LayerRange:
    """Consecutive layers of a vision tower.

    Attributes:
        first_layer: 0-based.
        num_layers: how many.
    """

    first_layer: int
    num_layers: int

    def __str__(self) -> str:
        last = self.first_layer + self.num_layers - 1
        return str(last) if self.num_layers == 1 else f"{self.first_layer}-{last}"


@dataclass(frozen=True)
class LayerScore:
    """What pruning costs with the scores of some layers; 0 where nothing is lost.

    Attributes:
        costs: of each image.
        agreement: mean over the images; see `Cost`.
    """

    costs: tuple[float, ...]
    agreement: float | None

    @property
    def cost(self) -> float:
        """The mean over the images."""
        return float(np.mean(self.costs))

    @property
    def standard_error(self) -> float | None:
        """Of that mean; None for a single image."""
        return standard_error(self.costs)


@dataclass(frozen=True)
class LayerRanking:
    """Layer ranges from the best to the worst.

    Attributes:
        settings: how they were scored.
        spec: the rule that kept the tokens; its layers are those that were given, or open.
        ranges: every range and its score, the lowest cost first.
        default: the range that the rule takes where none is given; it may not be among the ranges.
        random: the score of random importance, which does not depend on the image.
    """

    settings: ChoiceSettings
    spec: PruningSpec
    ranges: tuple[tuple[LayerRange, LayerScore], ...]
    default: LayerRange
    random: LayerScore

    @property
    def best(self) -> LayerRange:
        """The range to export with."""
        return self.ranges[0][0]

    @property
    def is_significant(self) -> bool:
        """Whether the best range beats random scores, by more than two standard errors where there are any."""
        lead, error = _lead(self.ranges[0][1], self.random)
        return lead > 2 * (error or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            **asdict(self.settings),
            "pruning": self.spec.to_dict(),
            "num_images": len(self.random.costs),
            "recommended": asdict(self.best),
            "is_significant": self.is_significant,
            "default": asdict(self.default),
            "random": _score_dict(self.random),
            "ranges": [{**asdict(layers), **_score_dict(score)} for layers, score in self.ranges],
        }

    def table(self) -> str:
        """The best ranges, the default, random scores, and the options to export with, for people."""
        uses_answers = self.settings.criterion == "answers"
        lines = [_row("layers", "divergence" if uses_answers else "dropped", "+-", "same token" * uses_answers)]
        for place, (layers, score) in enumerate(self.ranges, start=1):
            is_default = layers == self.default
            if place <= NUM_ROWS or is_default:
                note = f"   the default, {place} of {len(self.ranges)}" if is_default else ""
                lines.append(_score_row(str(layers), score) + note)
        lines += [_score_row("random scores", self.random), "", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> list[str]:
        lines = [f"export with: --first-layer {self.best.first_layer} --num-layers {self.best.num_layers}"]
        by_range = dict(self.ranges)
        if self.default in by_range and self.best != self.default:
            lead, error = _lead(by_range[self.best], by_range[self.default])
            spread = "" if error is None else f" +- {error:.4f}"
            lines.append(f"it costs {lead:.4f}{spread} less than the default")
        if not self.is_significant:
            lines.append("but random scores do about as well, so that this ranking says nothing about the layers")
        return lines


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of values; None for a single one."""
    return None if len(values) == 1 else float(np.std(values, ddof=1) / len(values) ** 0.5)


def _lead(better: LayerScore, worse: LayerScore) -> tuple[float, float | None]:
    """By how much one costs less than another, image by image, and the standard error."""
    differences = np.subtract(worse.costs, better.costs)
    return float(differences.mean()), standard_error(differences.tolist())


def _score_dict(score: LayerScore) -> dict[str, Any]:
    return {"cost": score.cost, "standard_error": score.standard_error, **asdict(score)}


def _score_row(name: str, score: LayerScore) -> str:
    error, agreement = score.standard_error, score.agreement
    return _row(
        name,
        f"{score.cost:.4f}",
        "" if error is None else f"{error:.4f}",
        "" if agreement is None else f"{agreement:.1%}",
    )


def _row(name: str, cost: str, error: str, agreement: str) -> str:
    return f"{name:<14}{cost:>12}{error:>10}{agreement:>12}".rstrip()
