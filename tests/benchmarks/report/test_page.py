from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.accuracy.ablation import ablation_tables
from benchmarks.report.page import PAGE, RESULTS, text_of, write_page

if TYPE_CHECKING:
    from pathlib import Path


def sample(vision_ms: float, prefill_ms: float, tokens: int) -> dict[str, float]:
    return {
        "preprocess_ms": 2.0,
        "vision_ms": vision_ms,
        "prefill_ms": prefill_ms,
        "ttft_ms": 2.0 + vision_ms + prefill_ms,
        "num_kept_tokens": tokens,
        "num_new_tokens": 16,
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
                "peak_memory_bytes": peak_bytes,
            }
            for name, values, ratio, goal, verdict, peak_bytes in (
                ("unpruned", [100.0, 300.0, 200.0], 1.0, None, "", 2**31),
                ("preset 192", [40.0, 90.0, 80.0], 0.4, 0.45, "met", 3 * 2**29),
            )
        ],
        "results": {
            "answers": {
                "samples": {
                    "unpruned": [sample(30, 400, 576), sample(32, 402, 576), sample(34, 404, 576)],
                    "preset 192": [sample(30, 100, 192)],
                }
            }
        },
    }


def test_a_table_shows_medians_ranges_ratios_and_goals(measured: dict[str, Any]) -> None:
    lines = text_of(measured).splitlines()
    assert lines[0] == "a cpu, 2 threads, 2026-01-02; hivtp 1."
    measured["environment"]["instruction_sets"] = ["avx2", "avx_vnni"]
    assert text_of(measured).startswith("a cpu (avx2, avx_vnni), 2 threads, ")
    assert "| time to first token | median ms | min | max | ratio | peak GiB | goal |" in lines
    assert "| unpruned | 200 | 100 | 300 | 1 | 2.00 |  |" in lines
    assert "| preset 192 | 80 | 40 | 90 | 0.4 | 1.50 | 0.45, met |" in lines


def test_a_table_shows_where_the_time_goes(measured: dict[str, Any]) -> None:
    lines = text_of(measured).splitlines()
    head = "| answers: where the time goes, median ms | image tokens | preprocess | vision | prefill |"
    assert lines[lines.index(head) + 2] == "| unpruned | 576 | 2 | 32 | 402 |"


def test_a_table_shows_answers_and_tokens_per_second(measured: dict[str, Any]) -> None:
    measured["rows"] = []
    measured["results"] = {
        f"throughput, batch size: {size}": {
            "samples": {
                "ours": [
                    {"batch_size": size, "num_new_tokens": 3 * size, "answers_per_s": 2.0, "tokens_per_s": 6.0 + size}
                ]
            }
        }
        for size in (1, 4)
    }
    assert text_of(measured).splitlines()[-1] == "| ours | 2 | 2 | 7 | 10 | 3 |"


def test_the_lengths_of_prompt_and_answers_are_stated(measured: dict[str, Any]) -> None:
    [passes] = [measured["results"]["answers"]["samples"]["unpruned"]]
    passes[0] |= {"num_text_tokens": 42, "num_image_tokens": 576}
    passes[1] |= {"num_new_tokens": 9}
    text = "Prompts: 576 tokens of the image before pruning, and 42 of text. Answers: 9 to 16 tokens."
    assert text_of(measured).splitlines()[2] == text


def test_the_ablation_has_a_table_for_each_setting_with_the_value_in_use_in_bold() -> None:
    def row(setting: str, value: float | str, count: int, right: float, is_default: bool = False) -> dict[str, Any]:
        accuracy = {"value": right, "low": right - 1, "high": right + 1}
        return {"setting": setting, "value": value, "count": count, "accuracy": accuracy, "is_default": is_default}

    tried = [
        row("layers", "layer 1", 36, 61.0),
        row("layers", "layer 2", 36, 92.04, is_default=True),
        row("layers", "layer 1", 9, 40.0),
        row("layers", "layer 2", 9, 80.0, is_default=True),
        row("global_ratio", 0.125, 36, 92.0, is_default=True),
    ]
    layers, ratio = ablation_tables(tried)
    assert layers == [
        ["layers, tokens kept", "36", "9"],
        ["layer 1", "61.0", "40.0"],
        ["layer 2", "**92.0**", "**80.0**"],
    ]
    assert ratio[1:] == [["0.125", "**92.0**", ""]]


def test_the_page_holds_what_was_measured_and_its_plots(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "budgets-7b-cpu.json").write_text(json.dumps(measured))
    page = tmp_path / "docs" / "benchmarks.md"
    write_page(tmp_path, page)
    text = page.read_text()
    assert "LLaVA-1.5-7B" in text
    assert "LLaVA-NeXT" not in text
    assert "Nothing here ran on a GPU" in text
    for name in ("where-the-time-goes.png", "ttft-over-tokens.png"):
        assert f"]({name})" in text
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_a_floor_is_where_a_table_shows_one(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for over_floor in (None, 1.5):
        measured["rows"][1]["over_floor"] = over_floor
        (tmp_path / "budgets-7b-cpu.json").write_text(json.dumps(measured))
        write_page(tmp_path, tmp_path / "benchmarks.md")
        assert ("A floor is the time" in (tmp_path / "benchmarks.md").read_text()) == (over_floor is not None)


def test_results_of_a_gpu_are_named(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured["environment"]["gpu"] = "a gpu"
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    page = tmp_path / "benchmarks.md"
    write_page(tmp_path, page)
    assert "a cpu, a gpu, 2 threads" in page.read_text()
    assert "## On a GPU" in page.read_text()
    assert "Nothing here ran on a GPU" not in page.read_text()


def test_the_page_shows_what_the_repository_holds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_page(RESULTS, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    pictures = re.findall(r"]\((\S+\.png)\)", text)
    assert len(pictures) == len(set(pictures)) >= 4
    assert {file.name for file in tmp_path.glob("*.png")} == set(pictures)
    assert "Bundles and PyTorch" in text
    assert text == PAGE.read_text(encoding="utf-8"), "run make report"
