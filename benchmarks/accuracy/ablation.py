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
    from benchmarks.accuracy.evaluation import Evaluation
    from benchmarks.timing.table import Table
    from hivtp_ops import PruningSpec

SHARES = (1 / 2, 1 / 4, 1 / 9)
SETTINGS: Mapping[str, Sequence[float]] = {
    "regions": (1, 2, 3, 4, 6),
    "global_ratio": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5),
    "window": (1, 2, 3, 4, 6, 12),
}


def ablate(evaluation: Evaluation, layers: LayerRange) -> list[dict[str, Any]]:
    """Measure every range of layers, and every value of SETTINGS with the given layers.

    Returns:
        For each setting, value and count: the accuracy with its interval, and whether the value is the one that
        HIVTP has at this count.
    """
    num_pictures, num_layers, num_patches = evaluation.encoded.received.shape
    bootstrap = Bootstrap(num_pictures)
    rows = []
    for count in (round(share * num_patches) for share in SHARES):
        for setting, value, rule, is_default in _trials(spec_for(count, evaluation.encoded.grid), layers, num_layers):
            accuracy = bootstrap.score(evaluation.is_right(rule(evaluation.encoded, count)))
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


def ablation_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each setting the accuracy by value and count, from `ablate`; bold where the value is the one in use.

    The ratio in use differs by count, and is tried at its own only: where a value was not tried, the cell is empty.
    """
    counts = list(dict.fromkeys(row["count"] for row in rows))
    tables: list[Table] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = {(row["value"], row["count"]): row for row in rows if row["setting"] == setting}
        table = [[f"{setting}, tokens kept", *map(str, counts)]]
        for value in dict.fromkeys(value for value, _ in found):
            name = value if isinstance(value, str) else f"{value:.3g}"
            table.append([name, *(_cell(found.get((value, count))) for count in counts)])
        tables.append(table)
    return tables


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['accuracy']['value']:.1f}"
    return f"**{text}**" if row["is_default"] else text
