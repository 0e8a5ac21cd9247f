"""The trained weights in the repository: they answer, with and without pruning, as their record says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks import demo
from benchmarks.miniature.evaluate import Accuracy, evaluate, table, to_dict, with_totals
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, KINDS, draw
from benchmarks.miniature.scores import BUDGETS, SCORES_NAME, chosen_layers, settings_of
from hivtp import Pipeline
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
        found = with_totals(evaluate(Pipeline.load(bundle, num_threads=1), HELD_OUT[:NUM_PICTURES]))["all"]
        expected = record[name]["all"]["percent"]
        # Four standard errors of so few questions.
        error = max(2.0, 4 * (expected * (100 - expected) / found.num_questions) ** 0.5)
        assert abs(found.percent - expected) <= error


def test_a_pruned_bundle_keeps_the_tokens_that_its_budget_says(bundles):
    pipeline = Pipeline.load(bundles["50 %"], num_threads=1)
    answer = pipeline.generate("How many shapes are there?", [draw(HELD_OUT[0]).image], max_new_tokens=3)
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (144, 72)
    assert answer.finish_reason == "stop"


def test_accuracies_add_up():
    accuracy = Accuracy(9, 10) + Accuracy(1, 10)
    assert accuracy == Accuracy(10, 20)
    assert accuracy.percent == 50
    assert accuracy.standard_error == pytest.approx(100 * (0.25 / 20) ** 0.5)


def test_the_totals_leave_out_the_relation_where_they_say_so():
    accuracy = dict.fromkeys(KINDS, Accuracy(10, 10)) | {"relation": Accuracy(3, 10)}
    totals = with_totals(accuracy)
    assert totals["all"] == Accuracy(63, 70)
    assert totals["all but relation"] == Accuracy(60, 60)
    assert to_dict(accuracy)["all but relation"]["percent"] == 100
    assert "100.0 %" in table(accuracy)


def test_the_demo_runs_on_drawn_pictures_and_on_a_photo(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_ROUNDS", 1)
    monkeypatch.setattr(demo, "NUM_PICTURES", 1)
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path / "drawn")])
    demo.main()
    drawn = capsys.readouterr().out
    assert "What number is shown?" in drawn
    assert "144 -> 72" in drawn
    assert "144 -> 16" in drawn
    assert (tmp_path / "drawn" / "kept-50.png").exists()
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path / "photo"), "--image", str(photo)])
    demo.main()
    assert "mean nothing" in capsys.readouterr().out
