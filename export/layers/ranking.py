"""A ranking of layer ranges: how it was asked for, what came out, and its table."""

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
    """How layer ranges are judged.

    Attributes:
        criterion: "answers" by what the language model says of the kept tokens, "features" by how much of
            what tells the tokens apart is dropped; see `layer_criteria`.
        questions: asked about every picture; the features need none.
        max_answer_tokens: an answer is judged over so many tokens at most.

    Raises:
        SpecError: there is no such criterion, or nothing to ask, or no answer to judge.
    """

    criterion: Criterion = "answers"
    questions: tuple[str, ...] = ("What is in the picture?",)
    max_answer_tokens: int = 16

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise SpecError(f"criterion is {self.criterion!r}; choose one of {', '.join(get_args(Criterion))}")
        if not all(question.strip() for question in self.questions) or not self.questions:
            raise SpecError("a question is empty; write what the model is to be asked about every picture")
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
class Judgement:
    """What pruning costs with some scores; 0 is nothing lost.

    Attributes:
        costs: of each picture.
        agreement: mean over the pictures; see `layer_criteria.Cost`.
    """

    costs: tuple[float, ...]
    agreement: float | None

    @property
    def cost(self) -> float:
        """The mean over the pictures."""
        return float(np.mean(self.costs))

    @property
    def standard_error(self) -> float | None:
        """Of that mean; None for a single picture."""
        return standard_error(self.costs)


@dataclass(frozen=True)
class LayerRanking:
    """Layer ranges from the best to the worst.

    Attributes:
        settings: how they were judged.
        spec: the rule that kept the tokens; its layers are as they were asked for, or open.
        ranges: every range and its judgement, the lowest cost first.
        default: the range that the rule takes where none is given; it may be none of the ranges.
        random: the judgement of random scores, which ask nothing of the picture.
    """

    settings: ChoiceSettings
    spec: PruningSpec
    ranges: tuple[tuple[LayerRange, Judgement], ...]
    default: LayerRange
    random: Judgement

    @property
    def best(self) -> LayerRange:
        """The range to export with."""
        return self.ranges[0][0]

    @property
    def is_telling(self) -> bool:
        """Whether the best range beats random scores, by more than two standard errors where there are any."""
        lead, error = _lead(self.ranges[0][1], self.random)
        return lead > 2 * (error or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            **asdict(self.settings),
            "pruning": self.spec.to_dict(),
            "num_pictures": len(self.random.costs),
            "recommended": asdict(self.best),
            "is_telling": self.is_telling,
            "default": asdict(self.default),
            "random": _judgement_dict(self.random),
            "ranges": [{**asdict(layers), **_judgement_dict(judgement)} for layers, judgement in self.ranges],
        }

    def table(self) -> str:
        """The best ranges, the default and random scores, and what to export with, for people."""
        uses_answers = self.settings.criterion == "answers"
        lines = [_row("layers", "divergence" if uses_answers else "dropped", "+-", "same token" * uses_answers)]
        for place, (layers, judgement) in enumerate(self.ranges, start=1):
            is_default = layers == self.default
            if place <= NUM_ROWS or is_default:
                note = f"   the default, {place} of {len(self.ranges)}" if is_default else ""
                lines.append(_judgement_row(str(layers), judgement) + note)
        lines += [_judgement_row("random scores", self.random), "", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> list[str]:
        lines = [f"export with: --first-layer {self.best.first_layer} --num-layers {self.best.num_layers}"]
        by_range = dict(self.ranges)
        if self.default in by_range and self.best != self.default:
            lead, error = _lead(by_range[self.best], by_range[self.default])
            spread = "" if error is None else f" +- {error:.4f}"
            lines.append(f"it costs {lead:.4f}{spread} less than the default")
        if not self.is_telling:
            lines.append("but random scores do about as well: nothing here tells the layers apart")
        return lines


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of values; None for a single one."""
    return None if len(values) == 1 else float(np.std(values, ddof=1) / len(values) ** 0.5)


def _lead(better: Judgement, worse: Judgement) -> tuple[float, float | None]:
    """By how much one judgement costs less than another, picture by picture, and the standard error."""
    differences = np.subtract(worse.costs, better.costs)
    return float(differences.mean()), standard_error(differences.tolist())


def _judgement_dict(judgement: Judgement) -> dict[str, Any]:
    return {"cost": judgement.cost, "standard_error": judgement.standard_error, **asdict(judgement)}


def _judgement_row(name: str, judgement: Judgement) -> str:
    error, agreement = judgement.standard_error, judgement.agreement
    return _row(
        name,
        f"{judgement.cost:.4f}",
        "" if error is None else f"{error:.4f}",
        "" if agreement is None else f"{agreement:.1%}",
    )


def _row(name: str, cost: str, error: str, agreement: str) -> str:
    return f"{name:<14}{cost:>12}{error:>10}{agreement:>12}".rstrip()
