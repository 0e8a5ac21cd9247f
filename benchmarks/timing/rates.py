"""Answers and tokens per second, over the size of a batch."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from benchmarks.timing.table import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.table import Table
    from benchmarks.timing.worker import Sample


def rate_tables(by_size: Sequence[Mapping[str, Sequence[Sample]]]) -> list[Table]:
    """Medians by batch size, one row per system, and the tokens of an answer; no table where none were measured.

    Args:
        by_size: samples by system, for each batch size; those of anything else are passed over.
    """
    by_size = [samples for samples in by_size if "answers_per_s" in next(iter(samples.values()))[0]]
    if not by_size:
        return []
    sizes = [next(iter(samples.values()))[0]["batch_size"] for samples in by_size]
    head = [f"{what}, batch of {size}" for what in ("answers/s", "output tokens/s") for size in sizes]
    found = [["throughput", *head, "tokens of an answer"]]
    for system in by_size[0]:
        passes = [samples[system] for samples in by_size]
        cells = [
            number(median(sample[key] for sample in timed))
            for key in ("answers_per_s", "tokens_per_s")
            for timed in passes
        ]
        lengths = {sample["num_new_tokens"] / sample["batch_size"] for timed in passes for sample in timed}
        length = " to ".join(f"{value:g}" for value in sorted({min(lengths), max(lengths)}))
        found.append([system, *cells, length])
    return [found]
