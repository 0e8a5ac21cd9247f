"""Comparison of rules at counts of tokens, and the tables that show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.intervals import with_margin
from benchmarks.miniature.pictures import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from benchmarks.accuracy.intervals import Bootstrap, Score
    from benchmarks.timing.table import Table

UNPRUNED = "unpruned"
HIVTP = "HIVTP"


@dataclass(frozen=True)
class Result:
    """What one rule reached with one count.

    Attributes:
        rule: its name.
        count: patches that it was to keep of each picture.
        num_kept: patches that it kept, mean.
        foreground_kept: share of the patches that show something, in percent.
        things_kept: share of the shapes and digits of which at least one patch is kept, in percent.
        is_right: [pictures, kinds] bool.
    """

    rule: str
    count: int
    num_kept: float
    foreground_kept: float
    things_kept: float
    is_right: NDArray[np.bool_]

    def of_kind(self, kind: str | None) -> NDArray[np.bool_]:
        """Right or wrong of one kind of question, or of all: [pictures, questions]."""
        return self.is_right if kind is None else self.is_right[:, KINDS.index(kind), None]


class Comparison:
    """All results over the same pictures.

    Args:
        results: of every rule at every count, and one of UNPRUNED, whose count is the number of patches.
        bootstrap: of as many pictures.
    """

    def __init__(self, results: Sequence[Result], bootstrap: Bootstrap) -> None:
        self.by_key = {(result.rule, result.count): result for result in results}
        self.bootstrap = bootstrap
        self.num_patches = next(result.count for result in results if result.rule == UNPRUNED)

    def at(self, rule: str, count: int) -> Result:
        """The result of a rule; UNPRUNED has one for every count."""
        return self.by_key[rule, self.num_patches if rule == UNPRUNED else count]

    def score(self, rule: str, count: int, kind: str | None = None) -> Score:
        """Accuracy, of one kind of question or of all."""
        return self.bootstrap.score(self.at(rule, count).of_kind(kind))

    def lead(self, rule: str, other: str, count: int, kind: str | None = None) -> Score:
        """Points by which a rule leads another on the same questions."""
        first, second = (self.at(name, count).of_kind(kind).astype(np.float64) for name in (rule, other))
        return self.bootstrap.score(first - second)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Every result with its accuracy and with HIVTP's lead over it, ready for JSON."""
        written = []
        for (rule, count), result in self.by_key.items():
            plain = {key: value for key, value in vars(result).items() if key != "is_right"}
            plain["accuracy"] = {kind or "all": asdict(self.score(rule, count, kind)) for kind in (None, *KINDS)}
            plain["hivtp_leads_by"] = (
                {}
                if rule == UNPRUNED
                else {kind or "all": asdict(self.lead(HIVTP, rule, count, kind)) for kind in (None, *KINDS)}
            )
            written.append(plain)
        return written


def accuracy_table(results: Sequence[Mapping[str, Any]], kind: str = "all") -> Table:
    """Accuracy in percent by rule and count, with half of its interval, from `Comparison.to_dicts`."""
    return _by_rule("rule, tokens kept", results, lambda result: with_margin(result["accuracy"][kind]))


def leads_table(results: Sequence[Mapping[str, Any]], kind: str = "all") -> Table:
    """Points by which HIVTP leads every other rule; starred where the interval holds no zero."""
    others = [result for result in results if result["rule"] != HIVTP]
    return _by_rule("HIVTP leads, tokens kept", others, lambda result: _lead(result["hivtp_leads_by"][kind]))


def kinds_table(results: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Accuracy of every rule by kind of question, at one count, with what it keeps as in Result."""
    kept = {"num_kept": "kept", "foreground_kept": "foreground", "things_kept": "things"}
    rows = [[f"{count} tokens", *kept.values(), *KINDS, "all"]]
    for result in results:
        if result["rule"] == UNPRUNED or result["count"] == count:
            right = [result["accuracy"][kind]["value"] for kind in (*KINDS, "all")]
            rows.append([result["rule"], *(f"{value:.1f}" for value in [*map(result.get, kept), *right])])
    return rows


def _by_rule(title: str, results: Sequence[Mapping[str, Any]], cell: Any) -> Table:
    """A row for every rule but UNPRUNED, a column for every count."""
    found = {(result["rule"], result["count"]): result for result in results if result["rule"] != UNPRUNED}
    counts = sorted({count for _, count in found}, reverse=True)
    rules = dict.fromkeys(rule for rule, _ in found)
    return [
        [title, *map(str, counts)],
        *([rule, *(cell(found[rule, count]) for count in counts)] for rule in rules),
    ]


def _lead(score: Mapping[str, float]) -> str:
    return f"{score['value']:.1f}{'*' if score['low'] > 0 or score['high'] < 0 else ''}"
