"""What a load says in numbers, and whether the server held to what it must."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing.table import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.serving.load import Run
    from benchmarks.timing.table import Table

QUANTILES = (50, 90, 99, 100)
MAX_LAG_SECONDS = 0.05
# After its slot a request still waits for its own prompt, in chunks between the steps of others; and before the wait
# for a slot begins, for its image.
WORK_SECONDS = 5.0


@dataclass(frozen=True)
class Goals:
    """What makes an answer a good one.

    Attributes:
        ttft_s: its first token comes within this time.
        gap_s: the mean time between its tokens is at most this.
    """

    ttft_s: float
    gap_s: float


@dataclass(frozen=True)
class Figures:
    """The numbers of one load. Times are in seconds, by quantile in percent.

    Attributes:
        num_offered: requests.
        num_answered: of these, that got a whole answer.
        num_refused: of these, that were told to come again (429 or 503).
        num_lost: of these, that got neither, or not before the client went away.
        answers_per_s: whole answers.
        good_per_s: answers that met the goals; of those that were not streamed the whole is judged by its end.
        tokens_per_s: of whole answers.
        ttft_s: to the first token, of streamed answers.
        gap_s: between two parts of a stream.
        answer_s: to the end.
        health_s: of GET /health.
        client_lag_s: of the client itself.
        lag_s: an upper bound of the 99th percentile of the lag of the server's event loop; None where it does not tell.
        resident_bytes: at the start, at the most and at the end; None where that is not known.
        load_average: of the machine.
    """

    num_offered: int
    num_answered: int
    num_refused: int
    num_lost: int
    answers_per_s: float
    good_per_s: float
    tokens_per_s: float
    ttft_s: dict[int, float]
    gap_s: dict[int, float]
    answer_s: dict[int, float]
    health_s: dict[int, float]
    client_lag_s: dict[int, float]
    lag_s: float | None
    resident_bytes: tuple[int, int, int] | None
    load_average: float

    @classmethod
    def of(cls, run: Run, goals: Goals) -> Figures:
        """Those of a run."""
        answered = [one for one in run.exchanges if one.is_answered]
        num_refused = sum(one.is_refused for one in run.exchanges)
        good = [
            one
            for one in answered
            if (one.ttft_s or one.end_s) <= goals.ttft_s and (not one.gaps_s or np.mean(one.gaps_s) <= goals.gap_s)
        ]
        memory = run.resident_bytes
        return cls(
            num_offered=len(run.exchanges),
            num_answered=len(answered),
            num_refused=num_refused,
            num_lost=len(run.exchanges) - len(answered) - num_refused,
            answers_per_s=len(answered) / run.seconds,
            good_per_s=len(good) / run.seconds,
            tokens_per_s=sum(one.num_tokens for one in answered) / run.seconds,
            ttft_s=quantiles([one.ttft_s for one in answered if one.ttft_s is not None]),
            gap_s=quantiles([gap for one in answered for gap in one.gaps_s]),
            answer_s=quantiles([one.end_s for one in answered]),
            health_s=quantiles(run.health_s),
            client_lag_s=quantiles(run.lag_s),
            lag_s=bucket_quantile(run.before, run.after, "event_loop_lag_seconds", 0.99),
            resident_bytes=(memory[0], max(memory), memory[-1]) if memory else None,
            load_average=run.load_average,
        )

    def faults(self, queue_seconds: float) -> list[str]:
        """What the server must hold to and did not.

        Args:
            queue_seconds: that a request may wait for its slot.
        """
        found = []
        if self.num_lost:
            found.append(f"{self.num_lost} requests got neither an answer nor a refusal")
        if self.ttft_s and self.ttft_s[100] > queue_seconds + WORK_SECONDS:
            found.append(f"a first token took {self.ttft_s[100]:.1f} s")
        if self.lag_s is not None and self.lag_s > MAX_LAG_SECONDS:
            found.append(f"the event loop was up to {self.lag_s * 1e3:.0f} ms late at its 99th percentile")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figures:
        """What `to_dict` gave, after JSON, which has no numbers for keys."""
        by_quantile = {
            name: {int(percent): seconds for percent, seconds in value.items()}
            for name, value in values.items()
            if isinstance(value, dict)
        }
        return cls(**{**values, **by_quantile})


def quantiles(values: Sequence[float]) -> dict[int, float]:
    """By percent; empty where there are none."""
    return {percent: float(np.percentile(values, percent)) for percent in QUANTILES} if values else {}


def bucket_quantile(before: Mapping[str, float], after: Mapping[str, float], name: str, share: float) -> float | None:
    """The smallest bound of a histogram's buckets that a share of what was counted between two looks lies below."""
    prefix = f"{name}_bucket "
    counts = {
        float(key.removeprefix(prefix)): value - before.get(key, 0.0)
        for key, value in after.items()
        if key.startswith(prefix)
    }
    total = counts.get(float("inf"), 0.0)
    return next((bound for bound in sorted(counts) if counts[bound] >= share * total), None) if total else None


def table(title: str, figures: Mapping[str, Figures]) -> Table:
    """A row for each system."""
    head = [title, "offered", "answered", "refused", "lost", "answers/s", "good/s", "tokens/s"]
    head += ["TTFT p50 s", "p99", "max", "gap p50 ms", "p99", "loop lag p99 ms", "RSS MiB", "load"]
    rows = [head]
    for name, one in figures.items():
        counts = [one.num_offered, one.num_answered, one.num_refused, one.num_lost]
        rates = [one.answers_per_s, one.good_per_s, one.tokens_per_s]
        times = [one.ttft_s.get(50), one.ttft_s.get(99), one.ttft_s.get(100)]
        gaps = [one.gap_s.get(percent) for percent in (50, 99)]
        memory = None if one.resident_bytes is None else one.resident_bytes[1] / 2**20
        rows.append(
            [
                name,
                *map(str, counts),
                *map(number, rates),
                *("–" if value is None else number(value) for value in times),
                *("–" if value is None else number(value * 1e3) for value in gaps),
                "–" if one.lag_s is None else f"≤ {one.lag_s * 1e3:g}",
                "–" if memory is None else number(memory),
                number(one.load_average),
            ]
        )
    return rows
