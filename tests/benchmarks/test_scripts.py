from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.speed import budgets, exact_int8, latency, prefetch, prefill, throughput, ttft
from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import Results
from benchmarks.timing.hugging_face import PAPERS_WAY, UNPRUNED
from benchmarks.timing.peaks import NAME
from hivtp.engines.int8 import overflows_int8

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import ModuleType

    from benchmarks.timing.worker import System

PEAKS = Peaks(flops_per_s=1e12, int8_ops_per_s=4e12, bytes_per_s=1e11)

pytestmark = pytest.mark.usefixtures("never_waits")


@pytest.fixture
def run(
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    measure_here: Callable[..., Results],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Runs a script on the tiny checkpoint with one round; returns what it wrote."""

    def with_given_peaks(systems: Sequence[System], num_rounds: int, num_threads: int) -> Any:
        """As `measure_with_peaks`, which takes as long as all else together."""
        return measure_here(systems, num_rounds, num_threads), PEAKS, Results({NAME: [asdict(PEAKS)]}, [0.0])

    # The other bundles take the same lines, and time.
    monkeypatch.setattr(latency, "BUNDLES", {"fp32, preset 192": latency.BUNDLES["fp32, preset 192"]})
    monkeypatch.setattr(latency, "PROFILED", ("fp32, preset 192",))
    monkeypatch.setattr(ttft, "BUNDLES", {ttft.FLOAT: ttft.BUNDLES[ttft.FLOAT]})
    monkeypatch.setattr(throughput, "TIMED", (ttft.FLOAT,))
    monkeypatch.setattr(throughput, "measure", measure_here)
    for script in (latency, ttft):
        monkeypatch.setattr(script, "measure_with_peaks", with_given_peaks)
    # One for all tests, so that they share the bundles.
    work_dir = tmp_path_factory.getbasetemp() / "benchmark-scripts"

    def run_script(script: ModuleType, *options: str) -> dict[str, Any]:
        output = work_dir / "results.json"
        shared = [
            f"--checkpoint={tiny_checkpoint}",
            f"--work-dir={work_dir}",
            "--rounds=1",
            "--threads=1",
            f"--output={output}",
        ]
        script.main([*shared, *options])
        written: dict[str, Any] = json.loads(output.read_text())
        assert str(work_dir) not in output.read_text()
        return written

    return run_script


def over_floors(written: dict[str, Any], table: str) -> dict[str, float | None]:
    return {row["label"]: row["over_floor"] for row in written["rows"] if row["table"] == table}


def labels(written: dict[str, Any], table: str) -> set[str]:
    return {row["label"] for row in written["rows"] if row["table"] == table}


def test_latency_times_the_vision_stage_and_its_parts(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(latency, "--tiles", "2")
    bundle = "fp32, preset 192"
    assert labels(written, "vision stage, tiles: 2") == {UNPRUNED, PAPERS_WAY, bundle}
    samples = written["results"]["vision stage, tiles: 2"]["samples"]
    assert set(samples[PAPERS_WAY][0]) >= {"vision_ms", "tower_ms", "selection_ms", "projector_ms"}
    [inside] = written["results"]["vision stage, tiles: 2, by profile"]["samples"][bundle]
    assert inside["selection_ms"] > 0
    assert sum(inside[stage] for stage in ("tower_ms", "selection_ms", "projector_ms")) == pytest.approx(
        inside["vision_ms"]
    )
    assert all(row["ratio"] > 0 for row in written["rows"])
    assert {row["verdict"] for row in written["rows"] if row["goal"] is not None} <= {"met", "missed", "out of reach"}
    over_floor = over_floors(written, "vision stage, tiles: 2")
    assert over_floor.pop(bundle) > 1
    assert set(over_floor.values()) == {None}
    assert written["environment"]["num_threads"] == 1
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in written["rows"])
    assert "projector" in printed


def test_ttft_times_whole_answers_also_the_papers_way(run: Any) -> None:
    written = run(ttft, "--new-tokens=3")
    systems = {UNPRUNED, PAPERS_WAY, ttft.FLOAT}
    for title in ("time to first token", "decode per token", "whole answer, 3 tokens"):
        assert labels(written, title) == systems
    samples = {name: passes[0] for name, passes in written["results"]["answers"]["samples"].items()}
    for title in ("time to first token", "decode per token"):
        over_floor = over_floors(written, title)
        assert over_floor.pop(ttft.FLOAT) > 1
        assert set(over_floor.values()) == {None}
    # Of the 8 x 8 patches the paper's counts keep 28 to 32.
    kept = {name: sample["num_kept_tokens"] for name, sample in samples.items()}
    assert (kept[UNPRUNED], kept[ttft.FLOAT]) == (64, 21)
    assert 28 <= kept[PAPERS_WAY] <= 32
    for name in (UNPRUNED, PAPERS_WAY):
        sample = samples[name]
        assert sample["num_image_tokens"] == 64
        assert sample["num_text_tokens"] > 30
        assert ("selection_ms" in sample) == (name == PAPERS_WAY)
        parts = ("preprocess_ms", "tower_ms", "selection_ms", "projector_ms", "prefill_ms")
        assert sum(sample.get(stage, 0) for stage in parts) == pytest.approx(sample["ttft_ms"])
        assert sample["prefill_ms"] > 0
    assert all(1 < sample["num_new_tokens"] <= 3 for sample in samples.values())


def test_throughput_counts_answers_and_tokens(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(throughput, "--batch-sizes", "3", "--new-tokens=3")
    samples = written["results"]["throughput, batch size: 3"]["samples"]
    assert set(samples) == {UNPRUNED, ttft.FLOAT}
    for [sample] in samples.values():
        assert 3 <= sample["num_new_tokens"] <= 9
        assert sample["answers_per_s"] == pytest.approx(3e3 / sample["batch_ms"])
        assert sample["tokens_per_s"] == pytest.approx(sample["num_new_tokens"] * 1e3 / sample["batch_ms"])
    assert "output tokens/s, batch of 3" in capsys.readouterr().out


def test_prefetching_is_compared_with_one_request_after_the_other(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "SIDES", {"small": (64, 48)})
    written = run(prefetch, "--new-tokens=2")
    assert labels(written, "small, time to first token") == {prefetch.ONE_BY_ONE, prefetch.PREFETCH}
    assert all(row["ratio"] > 0 for row in written["rows"])


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


def test_prefill_compares_what_is_asked_for_with_one_int4_decoder(run: Any) -> None:
    written = run(prefill, "--only", "int4, prefill in w8a8", "--new-tokens", "2")
    for quantity in prefill.QUANTITIES:
        assert labels(written, quantity) == {prefill.BASELINE, "int4, prefill in w8a8"}
    samples = written["results"]["answers"]["samples"]
    assert {len(found) for found in samples.values()} == {1}
    assert all(found["prefill_ms"] < found["ttft_ms"] for [found] in samples.values())
    with pytest.raises(SystemExit):
        run(prefill, "--new-tokens", "1")


def test_exact_int8_times_both_kernels_against_float32(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(exact_int8)
    systems = {exact_int8.FLOAT, exact_int8.USUAL, exact_int8.EXACT}
    assert labels(written, "vision stage, preset 192") == systems
    # Each has a process of its own, whose memory is known.
    assert all(row["peak_memory_bytes"] > 2**20 for row in written["rows"])
    samples = {name: sample for name, [sample] in written["results"]["vision"]["samples"].items()}
    assert samples[exact_int8.FLOAT]["relative_importance_error"] < 1e-6
    exact, usual = (samples[name]["relative_importance_error"] for name in (exact_int8.EXACT, exact_int8.USUAL))
    assert 0 < exact <= usual < 1
    printed = capsys.readouterr().out
    assert f"the usual kernels are {'inexact' if overflows_int8() else 'exact'} on this processor" in printed
    assert "kept-token agreement 100.0%" in printed
