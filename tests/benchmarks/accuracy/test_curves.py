from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.accuracy import ablation, curves
from benchmarks.accuracy.calibration import Calibration, LayerRange
from benchmarks.accuracy.comparison import (
    HIVTP,
    UNPRUNED,
    Comparison,
    Result,
    accuracy_table,
    kinds_table,
    leads_table,
)
from benchmarks.accuracy.curves import goals
from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.accuracy.intervals import Bootstrap
from benchmarks.accuracy.rivals import all_rules
from benchmarks.miniature.pictures import KINDS
from benchmarks.report import plots
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NUM_PICTURES = 200


def right(share: float) -> NDArray[np.bool_]:
    """Of every kind, the first pictures are right."""
    return np.repeat(np.arange(NUM_PICTURES)[:, None] < share * NUM_PICTURES, len(KINDS), axis=1)


def comparison(**shares: float) -> Comparison:
    """Accuracies of rules with 72 and 36 of 144 tokens, by name and count joined by an underscore."""
    results = [Result(UNPRUNED, 144, 144.0, 100.0, 100.0, right(shares.pop(UNPRUNED)))]
    for name, share in shares.items():
        rule, _, count = name.rpartition("_")
        results.append(Result(rule, int(count), float(count), 50.0, 80.0, right(share)))
    return Comparison(results, Bootstrap(NUM_PICTURES))


def test_goals_compare_what_they_say() -> None:
    measured = comparison(
        unpruned=0.97, HIVTP_72=0.96, HIVTP_36=0.9, random_72=0.9, random_36=0.74, adversary_72=0.4, adversary_36=0.3
    )
    loss, lead, adversary = goals(measured)
    assert loss.score.value == pytest.approx(1.0)
    assert lead.score.value == pytest.approx(16.0)
    assert adversary.score.value == pytest.approx(40.0)
    assert [goal.is_reached for goal in (loss, lead, adversary)] == [True, True, False]


def test_a_lead_is_taken_on_the_same_questions() -> None:
    measured = comparison(unpruned=1.0, HIVTP_36=0.8, random_36=0.8)
    assert measured.lead(HIVTP, "random", 36) == measured.lead(HIVTP, "random", 36, "number")
    assert measured.lead(HIVTP, "random", 36).high == 0
    assert measured.lead(UNPRUNED, HIVTP, 36).value == pytest.approx(20.0)


def test_tables_name_every_rule_and_star_sure_leads() -> None:
    results = comparison(unpruned=1.0, HIVTP_36=0.9, random_36=0.5, oracle_36=0.9).to_dicts()
    assert accuracy_table(results, "number")[1] == ["HIVTP", "90.0 ± 4.2"]
    assert leads_table(results) == [["HIVTP leads, tokens kept", "36"], ["random", "40.0*"], ["oracle", "0.0"]]
    by_rule = {row[0]: row[1:] for row in kinds_table(results, 36)}
    assert list(by_rule) == ["36 tokens", UNPRUNED, HIVTP, "random", "oracle"]
    assert by_rule["random"] == ["36.0", "50.0", "80.0", *["50.0"] * (len(KINDS) + 1)]


@pytest.fixture(scope="module")
def written(untrained_miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("accuracy") / "accuracy.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "SHARES", (0.25,))
        arguments = [f"--checkpoint={untrained_miniature}", "--pictures=3", "--calibration-pictures=2", "--ablation"]
        curves.main([*arguments, "--threads=1", f"--output={output}"])
    measured: dict[str, Any] = json.loads(output.read_text())
    return measured


def test_a_run_writes_every_rule_at_every_count(written: dict[str, Any]) -> None:
    counts = {rule: [] for rule in ("unpruned", "HIVTP", "HiPrune", "DivPrune", "random", "oracle", "adversary")}
    for result in written["results"]:
        counts.setdefault(result["rule"], []).append(result["count"])
        assert set(result["accuracy"]) == {"all", *KINDS}
    assert counts.pop("unpruned") == [144]
    assert all(found == [108, 72, 48, 36, 24, 16, 9] for found in counts.values())
    assert written["num_questions"] == 3 * len(KINDS)
    assert written["environment"]["num_threads"] == 1


def test_the_oracle_keeps_what_is_shown_and_its_adversary_does_not(written: dict[str, Any]) -> None:
    kept = {(result["rule"], result["count"]): result for result in written["results"]}
    # Less than 72 of 144 patches show something.
    assert (kept["oracle", 72]["foreground_kept"], kept["oracle", 72]["things_kept"]) == (100, 100)
    assert (kept["adversary", 72]["foreground_kept"], kept["adversary", 72]["things_kept"]) == (0, 0)
    random = kept["random", 36]
    assert 15 < random["foreground_kept"] < 35
    assert random["foreground_kept"] < random["things_kept"] < 100


def test_a_model_that_answers_without_what_is_shown_is_called_no_evidence(
    evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(threads=1, ablation=False, output=tmp_path / "accuracy.json")
    calibration = Calibration([LayerRange(1, 2, 50.0)], 2, 1)
    rules = {name: rule for name, rule in all_rules(1, 2, 2).items() if name in ("HIVTP", "random", "adversary")}
    shares = (1 / 2, 1 / 4, 1 / 9)
    for is_right in (False, True):
        every_answer = np.full((len(evaluation.pictures), len(KINDS)), is_right)
        monkeypatch.setattr(Evaluation, "is_right", lambda _self, _kept, found=every_answer: found)
        curves.report(options, evaluation, calibration, curves.compare(evaluation, rules, shares))
        assert (curves.NO_EVIDENCE in capsys.readouterr().out) is is_right


def test_layers_are_calibrated_on_pictures_that_nothing_is_measured_with(
    untrained_miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(curves, "calibrate", lambda evaluation: evaluation)
    monkeypatch.setattr(curves.Evaluation, "open", lambda _checkpoint, seeds: opened.append(set(seeds)) or seeds)
    parser = argparse.ArgumentParser()
    curves.add_options(parser, "accuracy.json")
    curves.prepare(parser.parse_args([f"--checkpoint={untrained_miniature}", "--threads=1"]))
    calibration, held_out = opened
    assert calibration
    assert held_out
    assert not calibration & held_out


def test_the_ablation_has_hivtp_itself_in_every_setting(written: dict[str, Any]) -> None:
    (own,) = {
        (result["count"], result["accuracy"]["all"]["value"])
        for result in written["results"]
        if (result["rule"], result["count"]) == (HIVTP, 36)
    }
    defaults = {
        row["setting"]: (row["count"], row["accuracy"]["value"]) for row in written["ablation"] if row["is_default"]
    }
    assert defaults == dict.fromkeys(("layers", "regions", "global_ratio", "window"), own)
    assert sum(row["setting"] == "layers" for row in written["ablation"]) == 21


def test_plots_are_drawn_from_what_was_written(written: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kind in ("all", "number"):
        plots.draw(written, kind, tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_say_which_extra_they_need(
    written: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"hivtp\[bench\]"):
        plots.draw(written, "all", tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
