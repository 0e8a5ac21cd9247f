"""How many held-out questions a bundle of the miniature answers right, greedily, by kind."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.miniature.pictures import HELD_OUT, KINDS, draw
from benchmarks.pipelines import load_pipeline
from benchmarks.timing.table import aligned
from hivtp import Request, SamplingParams
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from benchmarks.timing.table import Table
    from hivtp import Pipeline

NUM_PICTURES = 500
# Two tokens, and the one that ends the answer.
SAMPLING = SamplingParams(max_new_tokens=3)
_PICTURES_PER_BATCH = 8


def evaluate(pipeline: Pipeline, seeds: Sequence[int]) -> NDArray[np.bool_]:
    """Ask a bundle every question about the pictures of these seeds; returns what is right, [pictures, kinds].

    Raises:
        HivtpError: a request failed.
    """
    is_right: list[bool] = []
    for start in range(0, len(seeds), _PICTURES_PER_BATCH):
        pictures = [draw(seed) for seed in seeds[start : start + _PICTURES_PER_BATCH]]
        asked = [(picture.image, question) for picture in pictures for question in picture.questions]
        requests = [Request(question.text, [image], SAMPLING) for image, question in asked]
        for (_, question), answer in zip(asked, pipeline.generate_batch(requests), strict=True):
            if isinstance(answer, HivtpError):
                raise answer
            is_right.append(answer.text == question.answer)
    return np.array(is_right).reshape(-1, len(KINDS))


def to_dict(is_right: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Accuracy by kind and over all, from [pictures, kinds]: percent, its error were each question drawn by itself."""
    parts = {kind: is_right[:, column] for column, kind in enumerate(KINDS)}
    parts |= {"all": is_right, "all but relation": is_right[:, [kind != "relation" for kind in KINDS]]}
    return {name: _accuracy(part) for name, part in parts.items()}


def _accuracy(is_right: NDArray[np.bool_]) -> dict[str, float]:
    share = float(is_right.mean())
    error = (share * (1 - share) / is_right.size) ** 0.5
    return {"percent": round(100 * share, 2), "standard_error": round(100 * error, 2), "questions": is_right.size}


def table(accuracy: Mapping[str, Mapping[str, float]]) -> Table:
    """What `to_dict` gives, for people."""
    head = ["kind", "percent", "standard error", "questions"]
    return [head, *([name, *(f"{value:g}" for value in row.values())] for name, row in accuracy.items())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="what hivtp export wrote of the miniature")
    parser.add_argument(
        "--pictures", type=int, default=NUM_PICTURES, help="held-out pictures, with 7 questions each (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of each engine (default: its own choice)")
    options = parser.parse_args(arguments)
    with load_pipeline(options.bundle, options.threads) as pipeline:
        print(aligned(table(to_dict(evaluate(pipeline, HELD_OUT[: options.pictures])))))


if __name__ == "__main__":
    main()
