"""Our bundles beside other systems: turns, ratios and goals; the other systems are stood in for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers.foreign import ForeignWorker
from benchmarks.peers.systems import BUSY, GENAI, GENAI_BEST, GENAI_FLOAT, GOALS, OURS, PAIRS, open_ours
from benchmarks.timing.hugging_face import UNPRUNED
from benchmarks.timing.peaks import NAME, RATES
from benchmarks.timing.record import tables_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.timing.worker import Sample

ANSWERS = """
import json, sys
print("a library says hello")
print(json.dumps({"ready": "1.0"}), flush=True)
for number, _ in enumerate(sys.stdin):
    print(json.dumps({"sample": {"ttft_ms": number}, "others": 0.5}), flush=True)
"""


def test_a_system_in_another_environment_takes_its_turns():
    worker = ForeignWorker("other", [sys.executable, "-c", ANSWERS])
    worker.wait_until_ready()
    assert worker.about == {"ready": "1.0"}
    assert [worker.sample() for _ in range(2)] == [({"ttft_ms": 0}, 0.5), ({"ttft_ms": 1}, 0.5)]
    worker.close()


def test_one_that_ends_says_so():
    worker = ForeignWorker("other", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="other: ended with exit code 3"):
        worker.wait_until_ready()


def test_the_systems_fit_each_other():
    assert PAIRS.keys() == OURS.keys()
    assert {peer for peer, _ in PAIRS.values()} <= GENAI.keys()
    assert {kind for _, kind in PAIRS.values()} - {"none"} == {kind for kind, _ in GOALS} - {"busy"}
    assert set(BUSY) <= {*OURS, *GENAI}


class Fake:
    """Takes a time that grows with the rounds, so that ratios within a round are exact and others are not."""

    def __init__(self, name: str, factor: float) -> None:
        self.name = name
        self.factor = factor
        self.number = 0

    def wait_until_ready(self) -> None:
        """It is."""

    def sample(self) -> tuple[Sample, float]:
        self.number += 1
        if self.name == NAME:
            return dict.fromkeys(RATES, 1e12), 0.0
        times = {"ttft_ms": 100.0, "decode_ms_per_token": 10.0, "vision_ms": 50.0, "peak_memory_bytes": 2.0**30}
        counts = {"num_text_tokens": 42, "num_kept_tokens": 192, "num_new_tokens": 16}
        return {name: value * self.factor * self.number for name, value in times.items()} | counts, 0.25

    def close(self) -> None:
        """Nothing was opened."""


def test_ratios_are_those_within_a_round_and_are_held_against_goals(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def workers(*_: object) -> Iterator[Fake]:
        yield from (Fake(NAME, 1), Fake(UNPRUNED, 5))
        yield from (Fake("fp32 / fp32, preset 192, openvino", 0.5), Fake(GENAI_FLOAT, 1))

    monkeypatch.setattr(peers, "_workers", workers)
    monkeypatch.setattr(peers, "PAUSE_S", 0)
    monkeypatch.setattr(peers.Workspace, "bundles", lambda *_: dict.fromkeys(OURS, tmp_path))
    monkeypatch.setattr(peers, "BUSY", (GENAI_FLOAT,))
    output = tmp_path / "peers.json"
    options = [f"--checkpoint={tiny_checkpoint}", f"--work-dir={tmp_path}", "--rounds=2", f"--output={output}"]
    peers.main([*options, "--threads=1"])
    found = json.loads(output.read_text())
    rows = {(row["table"], row["label"]): row for row in found["rows"]}
    ours = rows["time to first token, beside " + GENAI_FLOAT, "fp32 / fp32, preset 192, openvino"]
    # The peer did a pass more before each round, with the foreign load.
    assert ours["values_ms"] == [100.0, 150.0]
    assert ours["goal"] == GOALS["float", "ttft_ms"]
    assert ours["verdict"] == "met"
    assert len(found["environment"]["load_average"]) == 2
    assert found["environment"]["peers"] == {}
    busy = rows["decode per token with a foreign core of load, beside without", GENAI_FLOAT]
    assert busy["ratio"] > 1
    assert GENAI_BEST not in capsys.readouterr().out
    assert any("time to first token" in table[0][0] for table in tables_of(found))


def test_ours_is_the_pipeline_in_the_engine_that_is_named(pruned_bundle):
    pytest.importorskip("openvino", reason="openvino is not installed")
    run = open_ours(1, pruned_bundle, "fp32 / fp32, preset 192, openvino", 4)
    sample = run()
    assert sample["num_new_tokens"] == 4
    assert sample["ttft_ms"] > 0
