"""The trained weights in the repository: they answer, with and without pruning, as their record says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import demo
from benchmarks.miniature.evaluate import SAMPLING, evaluate, table, to_dict
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, KINDS, draw
from benchmarks.miniature.scores import BUDGETS, SCORES_NAME, chosen_layers, settings_of
from benchmarks.pipelines import load_pipeline
from hivtp.export.exporter import export_bundle

if TYPE_CHECKING:
    from pathlib import Path

NUM_PICTURES = 24


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("miniature")
    settings = {name: settings_of(BUDGETS[name], chosen_layers()) for name in ("unpruned", "50 %")}
    return {
        name: export_bundle(CHECKPOINT, folder / str(index), setting, is_quiet=True).folder
        for index, (name, setting) in enumerate(settings.items())
    }


def test_the_weights_are_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors")) <= 8_000_000


def test_the_bundle_answers_held_out_questions_as_the_record_says(bundles):
    record = json.loads((CHECKPOINT / SCORES_NAME).read_text())["accuracy"]
    for name, bundle in bundles.items():
        found = to_dict(evaluate(load_pipeline(bundle, 1), HELD_OUT[:NUM_PICTURES]))["all"]
        assert found["questions"] == NUM_PICTURES * len(KINDS)
        expected = record[name]["all"]["percent"]
        # Four standard errors of this few questions.
        error = max(2.0, 4 * (expected * (100 - expected) / found["questions"]) ** 0.5)
        assert abs(found["percent"] - expected) <= error


def test_a_pruned_bundle_keeps_the_tokens_that_its_budget_says(bundles):
    pipeline = load_pipeline(bundles["50 %"], 1)
    answer = pipeline.generate("How many shapes are there?", [draw(HELD_OUT[0]).image], SAMPLING)
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (144, 72)
    assert answer.finish_reason == "stop"


def test_accuracies_are_by_kind_and_the_totals_leave_out_the_relation_where_they_say_so():
    is_right = np.ones((10, len(KINDS)), dtype=bool)
    is_right[:5, KINDS.index("relation")] = False
    accuracy = to_dict(is_right)
    assert list(accuracy) == [*KINDS, "all", "all but relation"]
    assert accuracy["relation"] == {"percent": 50.0, "standard_error": 15.81, "questions": 10}
    assert accuracy["all"]["percent"] == pytest.approx(100 * 65 / 70, abs=0.01)
    assert accuracy["all but relation"] == {"percent": 100.0, "standard_error": 0.0, "questions": 60}
    assert table(accuracy)[-1] == ["all but relation", "100", "0", "60"]


def test_the_demo_runs_on_drawn_pictures_and_on_a_photo(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_ROUNDS", 1)
    monkeypatch.setattr(demo, "NUM_PICTURES", 1)
    demo.main(["--output", str(tmp_path / "drawn")])
    drawn = capsys.readouterr().out
    assert "What number is shown?" in drawn
    head, *rows = drawn.splitlines()[-4:]
    assert head.split()[-2:] == ["right", "answers"]
    assert [row.split("->")[1].split()[0] for row in rows] == ["144", "72", "16"]
    assert (tmp_path / "drawn" / "kept-50.png").exists()
    monkeypatch.setattr(demo, "SHOWN", ("50 %",))
    demo.main(["--output", str(tmp_path / "photo"), "--image", str(photo)])
    assert "mean nothing" in capsys.readouterr().out
