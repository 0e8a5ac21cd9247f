from __future__ import annotations

from typing import Any

import pytest

from benchmarks.timing.graph_profile import stage_times


def event(category: str, name: str, ts: int, dur: int) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": ts, "dur": dur}


PRUNE = "_inlfunc_HierarchicalPrune_HierarchicalPrune.4_kernel_time"


def test_the_stages_of_a_graph_are_what_its_nodes_took_after_the_first_run() -> None:
    events = [
        event("Node", PRUNE, 5, 90),
        event("Node", "projector.inner.matmul_kernel_time", 95, 5),
        event("Session", "model_run", 0, 100),
        event("Node", "patches_kernel_time", 210, 500),
        event("Node", PRUNE, 720, 10),
        event("Node", PRUNE, 740, 20),
        event("Node", "projector.inner.matmul_kernel_time", 800, 100),
        # What is left of a fused node has a name of ONNX Runtime's own, and the selection may end late.
        event("Node", "BiasGelu_kernel_time", 900, 50),
        event("Node", PRUNE, 960, 5),
        event("Session", "model_run", 200, 1000),
    ]
    times = stage_times(events)
    assert times == pytest.approx({"vision_ms": 1.0, "tower_ms": 0.815, "selection_ms": 0.035, "projector_ms": 0.15})


def test_an_unpruned_graph_selects_nothing() -> None:
    run = [event("Node", "projector.inner_kernel_time", 50, 10), event("Session", "model_run", 0, 100)]
    later = [{**item, "ts": item["ts"] + 200} for item in run]
    assert stage_times([*run, *later])["selection_ms"] == 0
