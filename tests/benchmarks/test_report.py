from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.report import markdown, write_page

if TYPE_CHECKING:
    from pathlib import Path


def sample(vision_ms: float, prefill_ms: float, tokens: int) -> dict[str, float]:
    return {
        "preprocess_ms": 2.0,
        "vision_ms": vision_ms,
        "prefill_ms": prefill_ms,
        "ttft_ms": 2.0 + vision_ms + prefill_ms,
        "num_kept_tokens": tokens,
    }


@pytest.fixture
def measured() -> dict[str, Any]:
    return {
        "environment": {"cpu": "a cpu", "num_threads": 2, "date": "2026-01-02T03:04:05", "packages": {"hivtp": "1"}},
        "rows": [
            {
                "table": "time to first token",
                "label": name,
                "values_ms": values,
                "ratio": ratio,
                "goal": goal,
                "verdict": verdict,
            }
            for name, values, ratio, goal, verdict in (
                ("unpruned", [100.0, 300.0, 200.0], 1.0, None, ""),
                ("preset 192", [40.0, 90.0, 80.0], 0.4, 0.45, "met"),
            )
        ],
        "results": {
            "answers": {
                "samples": {
                    "unpruned": [sample(30, 400, 576), sample(32, 402, 576), sample(34, 404, 576)],
                    "preset 192": [{**sample(30, 100, 192), "peak_memory_bytes": 3 * 2**29}],
                }
            }
        },
    }


def test_a_table_shows_medians_ranges_ratios_and_goals(measured: dict[str, Any]) -> None:
    lines = markdown(measured).splitlines()
    assert lines[0] == "a cpu, 2 threads, 2026-01-02; hivtp 1."
    assert "| unpruned | 200 | 100 | 300 | 1 |  |" in lines
    assert "| preset 192 | 80 | 40 | 90 | 0.4 | 0.45, met |" in lines
    assert "| unpruned | 576 | 2 | 32 | 402 |" in lines
    assert lines[-1] == "| preset 192 | 1.50 |"


def test_the_page_holds_what_was_measured_and_its_plots(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "budgets-7b-cpu.json").write_text(json.dumps(measured))
    page = tmp_path / "docs" / "benchmarks.md"
    write_page(tmp_path, page)
    text = page.read_text()
    assert "LLaVA-1.5-7B" in text
    assert "LLaVA-NeXT" not in text
    for name in ("where-the-time-goes.png", "ttft-over-tokens.png"):
        assert f"]({name})" in text
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
