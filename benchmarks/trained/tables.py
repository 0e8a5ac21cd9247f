"""The tables of what was measured on trained weights, from its raw results."""

from __future__ import annotations

import math
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.trained.vision import REFERENCE as VISION_REFERENCE
from hivtp.export.layers.ranking import LayerRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.timing.table import Table


def vision_table(measured: Mapping[str, Any]) -> Table:
    """Each precision, preset and choice of layers against the float32 graph."""
    rows = [
        ["vision", "preset", "layers", "kept alike: mean", "worst image", "embeddings: error", "worst image", "export"]
    ]
    for row in measured["vision"]:
        if row["precision"] == VISION_REFERENCE:
            continue
        images = list(row["images"].values())
        kept, errors = ([image[name] for image in images] for name in ("kept_jaccard", "relative_error"))
        rows.append(
            [
                row["precision"],
                row["preset"],
                f"{LayerRange(**row['layers'])} ({row['choice']})",
                f"{mean(kept):.3f}",
                f"{min(kept):.3f}",
                f"{mean(errors):.4f}",
                f"{max(errors):.4f}",
                "refused" if row["refusal"] else "passes",
            ]
        )
    return rows


def language_table(measured: Mapping[str, Any]) -> Table:
    """Each decoder against the float32 one."""
    rows = [["language", "perplexity", "same greedy token", "logits: error"]]
    for row in measured["language"]:
        nats, same, error = (mean(piece[name] for piece in row["pieces"]) for name in row["pieces"][0])
        rows.append([row["decoder"], f"{math.exp(nats):.2f}", f"{100 * same:.1f} %", f"{error:.3f}"])
    return rows
