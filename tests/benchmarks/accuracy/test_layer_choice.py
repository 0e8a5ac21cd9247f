from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.accuracy import layer_choice
from benchmarks.accuracy.layer_choice import measure, table
from benchmarks.accuracy.rivals import Hivtp
from benchmarks.miniature.layers import foreground_share

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.accuracy.evaluation import Evaluation


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_every_range_is_held_against_the_labels(
    untrained_miniature: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = layer_choice.rank

    def rank_by_features(checkpoint: Path, spec: Any, _criterion: str, files: Any) -> Any:
        return rank(checkpoint, spec, "features", files)

    monkeypatch.setattr(layer_choice, "RULES", {"50 %": layer_choice.RULES["50 %"]})
    monkeypatch.setattr(layer_choice, "rank", rank_by_features)
    found = measure(untrained_miniature, 1, len(evaluation.pictures))
    rule = found["rules"]["50 %"]
    rows = {row["layers"]: row for row in rule["ranges"]}
    assert len(rows) == 6 + 5 + 4
    # The rule with its own layers is the HIVTP of the curves.
    kept = Hivtp(2, 2)(evaluation.encoded, 72)
    assert rows["2-3"]["accuracy"] == evaluation.is_right(kept).mean()
    assert rows["2-3"]["recall"] == foreground_share(evaluation.encoded.foreground, kept)
    choices = rule["choices"]
    assert all(choice["accuracy"] == rows[choice["layers"]]["accuracy"] for choice in choices.values())
    assert choices["best there is"]["accuracy"] == max(row["accuracy"] for row in rows.values())
    by_recall = max(rows, key=lambda layers: rows[layers]["recall"])
    assert choices["labels of the patches"]["layers"] == by_recall
    assert choices["features"]["correlation_with_recall"] == choices["answers"]["correlation_with_recall"]
    assert "labels of the patches" in table(found)
