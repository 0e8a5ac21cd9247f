"""Ablation: each setting of HIVTP varied by itself, at an exact count of tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.calibration import range_name
from benchmarks.accuracy.intervals import Bootstrap
from benchmarks.accuracy.rivals import Hivtp, spec_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.accuracy.calibration import LayerRange
    from benchmarks.accuracy.evaluation import Exam
    from hivtp_ops import PruningSpec

SHARES = (1 / 2, 1 / 4, 1 / 9)
SETTINGS: Mapping[str, Sequence[float]] = {
    "regions": (1, 2, 3, 4, 6),
    "global_ratio": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5),
    "window": (1, 2, 3, 4, 6, 12),
}


def ablate(exam: Exam, layers: LayerRange) -> list[dict[str, Any]]:
    """Measure every range of layers, and every value of SETTINGS with the given layers.

    Returns:
        For each setting, value and count: the accuracy with its interval, and whether the value is the one that
        HIVTP has at this count.
    """
    num_pictures, num_layers, num_patches = exam.encoded.received.shape
    bootstrap = Bootstrap(num_pictures)
    rows = []
    for count in (round(share * num_patches) for share in SHARES):
        for setting, value, rule, is_default in _trials(spec_for(count, exam.encoded.grid), layers, num_layers):
            accuracy = bootstrap.score(exam.is_right(rule(exam.encoded, count)))
            row = {"setting": setting, "value": value, "count": count, "is_default": is_default}
            rows.append(row | {"accuracy": asdict(accuracy)})
        print(f"  ablation: {count} tokens", flush=True)
    return rows


def _trials(spec: PruningSpec, layers: LayerRange, num_layers: int) -> Iterator[tuple[str, float | str, Hivtp, bool]]:
    """Setting, value, rule, and whether the value is that of the spec and the layers."""
    for first in range(num_layers):
        for number in range(1, num_layers - first + 1):
            is_chosen = (first, number) == (layers.first_layer, layers.num_layers)
            yield "layers", range_name(first, number), Hivtp(first, number), is_chosen
    for setting, values in SETTINGS.items():
        default = getattr(spec, setting)
        for value in sorted({*values, default}):
            rule = Hivtp(layers.first_layer, layers.num_layers, overrides={setting: value})
            yield setting, value, rule, value == default


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by value and count, for each setting; starred where the value is HIVTP's own."""
    lines = ["accuracy in percent, one setting varied at a time; * marks the value in use"]
    for setting, counts, trials in by_setting(rows):
        lines.append(f"{setting:<16}" + "".join(f"{count:>7} " for count in counts))
        for value, found in trials.items():
            cells = (
                f"{row['accuracy']['value']:7.1f}{'*' if row['is_default'] else ' '}" if row else " " * 8
                for row in found
            )
            lines.append(f"  {value:<14}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def by_setting(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[int], dict[str, list[Mapping[str, Any] | None]]]]:
    """Each setting, the counts of all, and for each of its values the row of every count.

    The ratio in use differs by count, and is tried at its own only: where a value was not tried, there is None.
    """
    counts = list(dict.fromkeys(row["count"] for row in rows))
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = {(row["value"], row["count"]): row for row in rows if row["setting"] == setting}
        values = dict.fromkeys(value for value, _ in found)
        names = {value if isinstance(value, str) else f"{value:.3g}": value for value in values}
        yield setting, counts, {name: [found.get((value, count)) for count in counts] for name, value in names.items()}
