from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.accuracy import parity
from benchmarks.accuracy.intervals import Bootstrap
from benchmarks.accuracy.parity import FP32, INT8, PYTORCH, PYTORCH_UNPRUNED, UNPRUNED, Run, compare, goals
from benchmarks.miniature.pictures import HELD_OUT, KINDS, draw

if TYPE_CHECKING:
    from pathlib import Path

PICTURES = [draw(seed) for seed in HELD_OUT[:10]]
RIGHT = [[question.answer for question in picture.questions] for picture in PICTURES]


def test_goals_count_kept_sets_answers_and_points() -> None:
    kept = [[0, 5, 7]] * 10
    wrong = [["?"] * len(KINDS), *RIGHT[1:]]
    runs = {
        PYTORCH: Run(kept, RIGHT),
        FP32: Run([[0, 5, 8], *kept[1:]], RIGHT),
        INT8: Run(kept, wrong),
    }
    same_kept, same_answer, int8_loss = goals(runs, PICTURES, Bootstrap(10))
    assert (same_kept.score.value, same_kept.is_reached) == (90.0, False)
    assert (same_answer.score.value, same_answer.is_reached) == (100.0, True)
    assert (int8_loss.score.value, int8_loss.is_reached) == (10.0, False)


def test_swapped_patches_are_told_by_how_much_they_differ() -> None:
    importance = np.ones((10, 144), dtype=np.float32)
    importance[0, 8] = 1.01
    ours = Run([[0, 5, 8], *[[0, 5, 7]] * 9], RIGHT)
    row = compare(ours, Run([[0, 5, 7]] * 10, RIGHT), PICTURES, importance, Bootstrap(10))
    assert row.kept_alike == pytest.approx(100 * (9 + 2 / 4) / 10)
    assert row.widest_swap == pytest.approx(0.01, rel=1e-2)
    assert row.same_answers == row.accuracy.value == 100


def test_bundles_keep_and_answer_what_pytorch_does(
    untrained_miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = parity.bundles
    monkeypatch.setattr(parity, "bundles", lambda spec: {name: every(spec)[name] for name in (FP32, INT8, UNPRUNED)})
    output = tmp_path / "parity.json"
    arguments = [f"--checkpoint={untrained_miniature}", "--pictures=3", "--calibration-pictures=1", "--threads=1"]
    parity.main([*arguments, f"--work-dir={tmp_path}", f"--output={output}"])
    written = json.loads(output.read_text())
    assert [goal["score"]["value"] for goal in written["goals"][:2]] == [100.0, 100.0]
    assert set(written["systems"]) == {PYTORCH, PYTORCH_UNPRUNED, FP32, INT8, UNPRUNED}
    for name in (FP32, UNPRUNED):
        row = written["systems"][name]
        assert (row["kept_alike"], row["widest_swap"], row["same_answers"]) == (100, 0, 100)
    assert (written["num_kept"], written["num_questions"]) == (72, 3 * len(KINDS))
    printed = capsys.readouterr().out
    assert all(name in printed for name in written["systems"])
