"""How many held-out questions a bundle of the miniature answers right, greedily, by kind."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.miniature.pictures import HELD_OUT, KINDS, draw
from hivtp import Pipeline, Request
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NUM_PICTURES = 500
# Two tokens, and the one that ends the answer.
MAX_NEW_TOKENS = 3
_PICTURES_PER_BATCH = 8


@dataclass(frozen=True)
class Accuracy:
    """Right answers among questions."""

    num_right: int
    num_questions: int

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.num_right + other.num_right, self.num_questions + other.num_questions)

    @property
    def percent(self) -> float:
        """The share of right answers."""
        return 100 * self.num_right / self.num_questions

    @property
    def standard_error(self) -> float:
        """Of `percent`, were each question drawn by itself."""
        share = self.num_right / self.num_questions
        return float(100 * (share * (1 - share) / self.num_questions) ** 0.5)


def evaluate(pipeline: Pipeline, seeds: Sequence[int]) -> dict[str, Accuracy]:
    """Ask a bundle every question about the pictures of these seeds; returns the accuracy by kind.

    Raises:
        HivtpError: a request failed.
    """
    num_right = dict.fromkeys(KINDS, 0)
    for start in range(0, len(seeds), _PICTURES_PER_BATCH):
        for kind, is_right in _ask(pipeline, seeds[start : start + _PICTURES_PER_BATCH]):
            num_right[kind] += is_right
    return {kind: Accuracy(right, len(seeds)) for kind, right in num_right.items()}


def _ask(pipeline: Pipeline, seeds: Sequence[int]) -> Iterator[tuple[str, bool]]:
    asked = [(picture.image, question) for picture in map(draw, seeds) for question in picture.questions]
    requests = [Request(question.text, [image], max_new_tokens=MAX_NEW_TOKENS) for image, question in asked]
    for (_image, question), answer in zip(asked, pipeline.generate_batch(requests), strict=True):
        if isinstance(answer, HivtpError):
            raise answer
        yield question.kind, answer.text == question.answer


def with_totals(accuracy: Mapping[str, Accuracy]) -> dict[str, Accuracy]:
    """Accuracies by kind, with those over all kinds and over all but the relation."""
    none = Accuracy(0, 0)
    return {
        **accuracy,
        "all": sum(accuracy.values(), none),
        "all but relation": sum((value for kind, value in accuracy.items() if kind != "relation"), none),
    }


def to_dict(accuracy: Mapping[str, Accuracy]) -> dict[str, Any]:
    """Accuracies with totals, ready for JSON."""
    return {
        name: {
            "percent": round(value.percent, 2),
            "standard_error": round(value.standard_error, 2),
            "questions": value.num_questions,
        }
        for name, value in with_totals(accuracy).items()
    }


def table(accuracy: Mapping[str, Accuracy]) -> str:
    """Accuracies with totals, for people."""
    return "\n".join(
        f"{name:<17} {value.percent:5.1f} % ± {value.standard_error:.1f}   {value.num_right} of {value.num_questions}"
        for name, value in with_totals(accuracy).items()
    )


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder that hivtp-export wrote from the miniature")
    parser.add_argument(
        "--pictures", type=int, default=NUM_PICTURES, help="held-out pictures, with 7 questions each (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of each engine (default: its own choice)")
    options = parser.parse_args()
    pipeline = Pipeline.load(options.bundle, num_threads=options.threads)
    print(table(evaluate(pipeline, HELD_OUT[: options.pictures])))


if __name__ == "__main__":
    main()
