"""Comparison of rules at counts of tokens, and the tables that show them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.miniature.pictures import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.accuracy.intervals import Bootstrap, Score

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
        self.counts = sorted({result.count for result in results if result.rule != UNPRUNED}, reverse=True)
        self.rules = list(dict.fromkeys(result.rule for result in results if result.rule != UNPRUNED))

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
            scores = {kind or "all": asdict(self.score(rule, count, kind)) for kind in (None, *KINDS)}
            leads = (
                {}
                if rule == UNPRUNED
                else {kind or "all": asdict(self.lead(HIVTP, rule, count, kind)) for kind in (None, *KINDS)}
            )
            written.append(plain | {"accuracy": scores, "hivtp_leads_by": leads})
        return written

    def table(self, kind: str | None = None) -> str:
        """Accuracy of every rule by count."""
        title = "all questions" if kind is None else f"questions of kind '{kind}'"
        whole = self.score(UNPRUNED, self.num_patches, kind)
        lines = [f"accuracy in percent, {title}; unpruned ({self.num_patches} tokens): {whole}"]
        lines.append(f"{'tokens':<26}" + "".join(f"{count:>7}" for count in self.counts) + "     +-")
        for rule in self.rules:
            scores = [self.score(rule, count, kind) for count in self.counts]
            widest = max((score.high - score.low) / 2 for score in scores)
            lines.append(f"{rule:<26}" + "".join(f"{score.value:7.1f}" for score in scores) + f"{widest:7.1f}")
        return "\n".join(lines)

    def leads_table(self, kind: str | None = None) -> str:
        """Points by which HIVTP leads every other rule, by count; starred where the interval holds no zero."""
        title = "all questions" if kind is None else f"questions of kind '{kind}'"
        lines = [f"points by which HIVTP leads, {title}; * where the 95 % interval holds no zero"]
        lines.append(f"{'tokens':<26}" + "".join(f"{count:>8}" for count in self.counts))
        for rule in self.rules:
            if rule != HIVTP:
                leads = [self.lead(HIVTP, rule, count, kind) for count in self.counts]
                cells = [f"{lead.value:7.1f}{'*' if lead.low > 0 or lead.high < 0 else ' '}" for lead in leads]
                lines.append(f"{rule:<26}" + "".join(cells))
        return "\n".join(lines)

    def kinds_table(self, count: int) -> str:
        """Accuracy of every rule by kind of question, at one count, with what it keeps as in Result."""
        lines = [f"accuracy in percent by kind of question, {count} of {self.num_patches} tokens"]
        lines.append(f"{'':<26} kept shown things" + "".join(f"{kind:>10}" for kind in (*KINDS, "all")))
        for rule in (UNPRUNED, *self.rules):
            result = self.at(rule, count)
            scores = [self.score(rule, count, kind) for kind in (*KINDS, None)]
            line = f"{rule:<26}{result.num_kept:5.1f}{result.foreground_kept:6.1f}{result.things_kept:7.1f}"
            lines.append(line + "".join(f"{score.value:10.1f}" for score in scores))
        return "\n".join(lines)
