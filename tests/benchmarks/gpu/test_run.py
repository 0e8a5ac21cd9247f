from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.gpu import run as gpu
from benchmarks.gpu.goals import Goal, goal_table
from benchmarks.gpu.kernel import Timing
from benchmarks.gpu.systems import Language, Variant, open_answers, open_warm
from benchmarks.report.tables import gpu as page
from benchmarks.timing import harness
from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import LocalSystem, Pass, Results, Sample, System, measure_in_turns
from benchmarks.timing.record import Row
from hivtp.engines import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def measure_here(
    systems: Sequence[System], num_rounds: int, num_threads: int, device: str, waits_for_quiet: bool
) -> tuple[Results, Peaks, Results]:
    """As `measure_with_peaks` does, but in this process, with given peaks: the rest would take most of the time."""
    assert device == "cpu"
    assert waits_for_quiet, "a CPU's work does"
    local = []
    for system in systems:
        opened = system.open(num_threads=num_threads, **system.arguments)
        passes = opened if isinstance(opened, dict) else {system.name: opened}
        local += [LocalSystem(name, run) for name, run in passes.items()]
    return measure_in_turns(local, num_rounds, waits_for_quiet=False), Peaks(1e12, 1e11), Results({}, [0.0])


# By precision other than float16 the engine that runs it on a CPU.
OTHERS = {"bf16": "torch", "fp8": "onnxruntime"}


def engines_here(bundle: Path, _device: str) -> list[str]:
    precision = bundle.name.partition("-")[0]
    return [OTHERS[precision]] if precision in OTHERS else ["onnxruntime", "torch"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all parts but the kernel write, on a CPU and at the tiny shape."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PAUSE_S", 0.0)
        patch.setattr(gpu, "measure_with_peaks", measure_here)
        patch.setattr(gpu, "VISION_RUNS", 2)
        patch.setattr(gpu, "BATCH_TOKENS", 4)
        # The one leaves its embeddings on the device, as the engines of a GPU do; the other does not.
        patch.setattr(gpu, "engines", engines_here)
        # As where there is TensorRT.
        patch.setattr(gpu, "builds_plans", lambda _: True)
        # To compile takes minutes.
        patch.setattr(gpu, "LANGUAGES", {"plain": False})
        only = [name for name in gpu.PARTS if name != "kernel"]
        output = folder / "results.json"
        options = Namespace(shape="tiny", work_dir=folder, threads=1, rounds=1, output=output, only=only)
        gpu.run(options, "cpu")
    assert str(folder) not in output.read_text()
    written: dict[str, Any] = json.loads(output.read_text())["parts"]
    assert list(written) == only
    return written


def rows(part: Mapping[str, Any], table: str) -> dict[str, Mapping[str, Any]]:
    return {row["label"]: row for row in part["rows"] if row["table"] == table}


OURS = {f"{budget}, {engine}" for budget in ("unpruned", "preset 192") for engine in ("onnxruntime", "torch")}
PLAIN = {f"{name}, plain" for name in OURS}


def test_every_part_has_goals_with_what_was_found_and_the_floor(measured: dict[str, Any]) -> None:
    bounds = {name: [goal["bound"] for goal in part["goals"]] for name, part in measured.items()}
    assert bounds == {"vision": [0.30, 2.0], "llava-1.5": [0.35, 0.50], "llava-next": [0.30], "throughput": [1.6]}
    for part in measured.values():
        for goal in part["goals"]:
            assert goal["system"].startswith("preset 192, ")
            assert goal["found"] > 0
            assert goal["over_floor"] > 1
            is_met = goal["found"] <= goal["bound"] if goal["sense"] == "at most" else goal["found"] >= goal["bound"]
            assert goal["verdict"] == ("met" if is_met else "missed")


def test_the_vision_stage_is_compared_with_eager_attention(measured: dict[str, Any]) -> None:
    found = rows(measured["vision"], "vision stage, 1 image")
    others = {f"{name}, {budget}, {engine}" for name, engine in OTHERS.items() for budget in gpu.BUDGETS}
    assert set(found) == {gpu.EAGER, gpu.HUGGING_FACE} | others | OURS
    assert found[gpu.EAGER]["ratio"] == 1
    assert found[gpu.EAGER]["over_floor"] is None


@pytest.mark.parametrize(("name", "num_tiles"), [("llava-1.5", 1), ("llava-next", 5)])
def test_answers_are_about_as_many_tokens_as_the_preset_keeps_of_each_tile(
    measured: dict[str, Any], name: str, num_tiles: int
) -> None:
    part = measured[name]
    assert set(rows(part, "time to first token")) == {gpu.HUGGING_FACE} | PLAIN
    assert set(rows(part, "decode per token")) == {gpu.HUGGING_FACE} | PLAIN
    by_ours = rows(part, "time to first token, by the same unpruned")
    assert set(by_ours) == {name for name in PLAIN if name.startswith("preset 192")}
    for row in by_ours.values():
        unpruned_ms = rows(part, "time to first token")[row["label"].replace("preset 192", "unpruned")]["values_ms"]
        assert row["baseline_ms"] == unpruned_ms
    samples = {label: passes[0] for label, passes in part["results"]["answers"]["samples"].items()}
    unpruned, kept = (samples[f"{budget}, torch, plain"] for budget in ("unpruned", "preset 192"))
    assert unpruned["num_tiles"] == kept["num_tiles"] == num_tiles
    assert unpruned["num_kept_tokens"] == samples[gpu.HUGGING_FACE]["num_image_tokens"]
    # A row of tiles that keeps a token ends with a newline.
    assert 21 * num_tiles <= kept["num_kept_tokens"] <= 21 * num_tiles + (16 if num_tiles > 1 else 0)


def test_throughput_is_that_of_tokens(measured: dict[str, Any]) -> None:
    part = measured["throughput"]
    samples = part["results"]["throughput"]["samples"]
    assert set(samples) == {gpu.HUGGING_FACE} | PLAIN
    [goal] = part["goals"]
    [theirs] = samples[gpu.HUGGING_FACE]
    ratios = {name: samples[name][0]["tokens_per_s"] / theirs["tokens_per_s"] for name in PLAIN if "192" in name}
    assert goal["found"] == pytest.approx(max(ratios.values()))
    assert goal["found"] == pytest.approx(ratios[goal["system"]])
    assert goal["sense"] == "at least"


def test_an_engine_of_a_gpu_runs_the_vision_graph_in_each_way_that_it_has() -> None:
    assert gpu.vision_ways("onnxruntime") == gpu.vision_ways("torch") == {"": {}}
    assert set(gpu.vision_ways("onnxruntime-cuda")) == set(gpu.vision_ways("tensorrt")) == {"", "CUDA graph"}
    assert set(gpu.vision_ways("torch-cuda")) == {"", "CUDA graph", "compiled"}
    for settings in gpu.vision_ways("torch-cuda").values():
        EngineSettings(1, **settings)


def test_the_kernel_is_held_to_its_slower_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def timings(_spec: object, num_tiles: int, num_rounds: int) -> list[Timing]:
        labels = {"kernel, random scores": 6.0, "operators, random scores": 60.0}
        labels |= {"kernel, equal scores": 8.0 + num_tiles, "operators, equal scores": 90.0}
        return [Timing(label, num_tiles, [us] * num_rounds, [5.0] * num_rounds) for label, us in labels.items()]

    monkeypatch.setattr(gpu, "load_kernel", lambda *_: None)
    monkeypatch.setattr(gpu.kernel, "measure", timings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = gpu.measure_kernel(gpu.Bench(Namespace(rounds=3), "cuda"))
    assert [(goal.found, goal.bound, goal.verdict) for goal in found.goals] == [(9, 10, "met"), (72, 20, "missed")]
    first, *_ = found.tables["selection, 576 patches, batch 1"]
    assert (first.label, first.values_ms) == ("kernel, random scores", [0.006] * 3)
    assert first.ratio == pytest.approx(0.1)
    assert found.results["kernel"].values("kernel, equal scores, batch 64", "device_us") == [72.0] * 3


def test_a_goal_that_nothing_ran_for_is_not_measured() -> None:
    goals = [Goal.of_ratio("first token", 0.3, []), Goal.of_floor("vision", 2.0, [Row("ours", [1.0], [1.0])])]
    assert [goal.verdict for goal in goals] == ["not measured"] * 2
    assert goal_table([goals[0].to_dict()])[1] == ["first token", "at most 0.3", "–", "not measured", "–", ""]


def test_the_best_of_our_systems_is_held_to_a_goal() -> None:
    rows = [Row("a", [4.0], [8.0], floor_ms=1.0), Row("b", [3.0], [9.0], floor_ms=0.5), Row("c", [1.0], [1.0])]
    by_ratio, by_floor = Goal.of_ratio("ratio", 0.3, rows), Goal.of_floor("floor", 4.0, rows)
    assert (by_ratio.system, by_ratio.found, by_ratio.over_floor) == ("b", pytest.approx(1 / 3), 6.0)
    assert (by_floor.system, by_floor.found, by_floor.verdict) == ("a", 4.0, "met")


def test_the_page_shows_the_goals_and_every_part(measured: dict[str, Any]) -> None:
    text = page({"parts": measured})
    lines = text.splitlines()
    assert lines[0] == "| what | goal | found |  | time / floor | system |"
    assert sum("| at most 0.3 |" in line for line in lines) == 2
    for name in measured:
        assert f"### {name}" in lines
    assert "throughput | answers/s, batch of 8" in text


def test_a_part_that_is_measured_again_takes_the_place_of_the_older(tmp_path: Path) -> None:
    output = tmp_path / "results" / "gpu.json"
    for name, value in (("vision", 1), ("kernel", 2), ("vision", 3)):
        gpu.write_part(output, name, {"value": value})
    assert json.loads(output.read_text()) == {"parts": {"vision": {"value": 3}, "kernel": {"value": 2}}}
    assert [file.name for file in output.parent.iterdir()] == ["gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match=r"^There is no CUDA device [^.]*\.$"):
        gpu.main(["--only", "vision", "kernel", f"--output={output}"])
    assert not output.exists()


def test_a_system_is_warm_before_it_is_timed_and_a_pass_is_the_median_of_its_runs() -> None:
    def open_counting(num_threads: int, start: int) -> Pass:
        passes = iter(range(start, 100))
        return lambda: {"pass": next(passes), "threads": num_threads}

    run = open_warm(2, open_counting, num_runs=5, start=10)
    # After 10, 11 and 12.
    assert run() == {"pass": 15, "threads": 2}
    assert run() == {"pass": 20, "threads": 2}


def test_a_variant_that_cannot_run_is_named_with_its_reason(
    tiny_checkpoint: Path, exact_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [Variant("broken", exact_bundle, "no-such-engine"), Variant("sound", exact_bundle, "onnxruntime")]
    variants.append(replace(variants[0], name="broken too"))
    passes = open_answers(1, variants, Language(tiny_checkpoint, "cpu"), num_new_tokens=2, picture_size=(64, 64))
    sample: Sample = passes["sound"]()
    assert set(passes) == {"sound"}
    assert sample["num_kept_tokens"] == 21
    printed = capsys.readouterr().out
    assert "broken is left out: no engine is named 'no-such-engine'" in printed
    assert "broken too is left out" in printed
