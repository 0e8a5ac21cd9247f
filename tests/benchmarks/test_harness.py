from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks import budgets, harness, latency, ttft
from benchmarks.harness import (
    LocalSystem,
    Pass,
    Results,
    Row,
    Sample,
    Stopwatch,
    System,
    measure,
    measure_in_turns,
    table,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def open_counting(num_threads: int, log: Path, name: str) -> Pass:
    passes = 0

    def run() -> Sample:
        nonlocal passes
        passes += 1
        with log.open("a") as stream:
            stream.write(f"{name} starts\n{name} ends\n")
        return {
            "pass": passes,
            "process": os.getpid(),
            "omp": int(os.environ["OMP_NUM_THREADS"]),
            "threads": num_threads,
        }

    return run


def open_failing(num_threads: int) -> Pass:
    raise ValueError(f"nothing to time with {num_threads} threads")


def open_dying(num_threads: int) -> Pass:
    return lambda: os._exit(num_threads)


@pytest.fixture
def never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run on machines with other work to do.
    monkeypatch.setattr(harness, "MAX_WAIT_S", 0.0)
    monkeypatch.setattr(harness, "MAX_OTHER_CORES", float("inf"))


def counting(log: Path, *names: str) -> list[System]:
    return [System(name, open_counting, {"log": log, "name": name}) for name in names]


@pytest.mark.usefixtures("never_waits")
def test_systems_take_turns_and_never_overlap(tmp_path: Path) -> None:
    log = tmp_path / "log"
    measure(counting(log, "A", "B", "C"), num_rounds=2, num_threads=1)
    turn = [f"{name} {event}" for name in "ABC" for event in ("starts", "ends")]
    assert log.read_text().splitlines() == turn * 3


@pytest.mark.usefixtures("never_waits")
def test_each_system_has_a_process_and_the_threads_of_its_own(tmp_path: Path) -> None:
    results = measure(counting(tmp_path / "log", "A", "B"), num_rounds=2, num_threads=3)
    processes = {name: set(results.values(name, "process")) for name in "AB"}
    assert all(len(found) == 1 for found in processes.values())
    assert len({os.getpid()}.union(*processes.values())) == 3
    assert results.values("A", "omp") == results.values("A", "threads") == [3, 3]


@pytest.mark.usefixtures("never_waits")
def test_the_warm_up_is_dropped(tmp_path: Path) -> None:
    results = measure(counting(tmp_path / "log", "A"), num_rounds=3, num_threads=1)
    assert sorted(results.values("A", "pass")) == [2, 3, 4]


def test_the_quietest_rounds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_wait_until_quiet", lambda: None)
    noise = iter([0.9, 0.5, 0.0, 0.8, 0.05])
    honest_round = harness._round
    monkeypatch.setattr(harness, "_round", lambda workers: (next(noise), honest_round(workers)[1]))
    results = measure(counting(tmp_path / "log", "A"), num_rounds=2, num_threads=1)
    assert results.other_cores == [0.0, 0.05]
    assert results.values("A", "pass") == [3, 5]


def test_what_a_worker_raises_names_its_system() -> None:
    with pytest.raises(RuntimeError, match=r"broken: (.|\n)*ValueError: nothing to time with 2 threads"):
        measure([System("broken", open_failing)], num_rounds=1, num_threads=2)


@pytest.mark.usefixtures("never_waits")
def test_a_worker_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="dying: ended with exit code 7"):
        measure([System("dying", open_dying)], num_rounds=1, num_threads=7)


def test_a_stopwatch_counts_milliseconds() -> None:
    with Stopwatch() as watch:
        time.sleep(0.02)
    assert 20 <= watch.ms < 1000


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine was slow in the second round, for both; the medians' ratio would be 1.
    row = Row("ours", [1.0, 20.0, 2.0], [2.0, 40.0, 2.0])
    assert row.ratio == 0.5
    assert row.verdict == ""


@pytest.mark.parametrize(("goal", "verdict"), [(0.5, "met"), (0.49, "missed")])
def test_a_goal_is_met_up_to_its_value(goal: float, verdict: str) -> None:
    row = Row("ours", [1.0], [2.0], goal)
    assert row.verdict == verdict
    assert table("title", [row]).splitlines()[1].endswith(f"{goal:.3f}  {verdict}")


def test_selecting_is_what_the_ops_nodes_took_after_the_first_run() -> None:
    def event(category: str, name: str, ts: int, dur: int) -> dict[str, str | int]:
        return {"cat": category, "name": name, "ts": ts, "dur": dur}

    events = [
        event("Node", "_inlfunc_HierarchicalPrune_HierarchicalPrune.4_kernel_time", 5, 90),
        event("Session", "model_run", 0, 100),
        event("Node", "patches_kernel_time", 210, 500),
        event("Node", "_inlfunc_HierarchicalPrune_HierarchicalPrune.4_kernel_time", 720, 10),
        event("Node", "_inlfunc_HierarchicalPrune_HierarchicalPrune.5_kernel_time", 740, 20),
        event("Session", "model_run", 200, 1000),
    ]
    assert latency.selecting_times(events) == {"selecting_ms": 0.03, "vision_ms": 1.0}


def test_results_hold_one_quantity_by_round() -> None:
    results = Results({"A": [{"ttft_ms": 1.0}, {"ttft_ms": 2.0}]}, [0.0, 0.0])
    assert results.values("A", "ttft_ms") == [1.0, 2.0]


@pytest.mark.usefixtures("never_waits")
def test_systems_of_one_process_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    systems = [LocalSystem(name, open_counting(num_threads=1, log=log, name=name)) for name in "AB"]
    results = measure_in_turns(systems, num_rounds=2)
    assert log.read_text().splitlines()[:8] == ["A starts", "A ends", "B starts", "B ends"] * 2
    assert {int(value) for value in results.values("B", "process")} == {os.getpid()}
    assert min(results.values("A", "pass")) > 1


@pytest.mark.usefixtures("never_waits")
def test_budgets_share_one_decoder(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    options = [f"--checkpoint={tiny_checkpoint}", f"--work-dir={tmp_path}", "--rounds=1", f"--output={output}"]
    budgets.main([*options, "--presets", "192", "--new-tokens=3"])
    report = json.loads(output.read_text())
    [unpruned], [pruned] = (report["results"]["answers"]["samples"][name] for name in ("unpruned", "preset 192"))
    assert (unpruned["num_kept_tokens"], pruned["num_kept_tokens"]) == (64, 21)
    goals = {row["label"]: row["goal"] for row in report["rows"] if row["table"] == "time to first token"}
    assert goals == {"unpruned": None, "preset 192": 0.45}
    assert "peak memory" in capsys.readouterr().out
    decoders = [file.stat().st_ino for file in tmp_path.rglob("decoder.onnx.data")]
    assert len(decoders) == 2
    assert len(set(decoders)) == 1


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("script", [latency, ttft])
def test_a_script_runs_from_a_checkpoint_to_a_report(
    script: ModuleType,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The other bundles take the same lines, and time.
    monkeypatch.setattr(latency, "BUNDLES", {name: latency.BUNDLES[name] for name in latency.PROFILED})
    output = tmp_path / "results.json"
    script.main([f"--checkpoint={tiny_checkpoint}", f"--work-dir={tmp_path}", "--rounds=1", f"--output={output}"])
    report = json.loads(output.read_text())
    assert report["environment"]["num_threads"] == 2
    assert {"hivtp", "torch", "onnxruntime"} <= set(report["environment"]["packages"])
    ours = {row["label"] for row in report["rows"]}
    assert ours >= set(script.BUNDLES) | {script.HUGGING_FACE}
    assert {row["verdict"] for row in report["rows"] if row["goal"] is not None} <= {"met", "missed"}
    assert all(row["ratio"] > 0 for row in report["rows"])
    printed = capsys.readouterr().out
    assert all(label in printed for label in ours)
    assert "cpu: " in printed
