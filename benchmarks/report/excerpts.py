"""Tables of results in other pages; `python -m benchmarks.report` writes each between two marks of its page."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.comparison import HIVTP, UNPRUNED
from benchmarks.timing.hugging_face import UNPRUNED as HUGGING_FACE
from benchmarks.timing.table import markdown
from benchmarks.trained.tables import language_table, vision_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from benchmarks.timing.table import Table

BEGIN, END = "<!-- make report: {} -->", "<!-- end -->"
FIRST_TOKEN, DECODE = "time to first token", "decode per token"


def write_excerpts(results: Path, page: Path) -> None:
    """Replace what stands between the marks of a page.

    Args:
        results: folder of the raw samples.
        page: a text in which each table has its marks: BEGIN with its name, and END.

    Raises:
        KeyError: there is no table of that name.
    """
    text = page.read_text(encoding="utf-8")
    for name in re.findall(BEGIN.format("(.+)"), text):
        begin = BEGIN.format(name)
        [between] = re.findall(f"{re.escape(begin)}\n.*?{re.escape(END)}", text, re.DOTALL)
        text = text.replace(between, f"{begin}\n\n{markdown(TABLES[name](results))}\n\n{END}")
    page.write_text(text, encoding="utf-8")


def figures(results: Path) -> Table:
    """What pruning gains, what all of it gains, and what pruning costs."""
    budgets = _rows(results, "budgets-7b-cpu", FIRST_TOKEN)
    answers = _rows(results, "ttft-cpu", FIRST_TOKEN)
    float32, rounded = answers[HUGGING_FACE], answers["int8 / int4, preset 192"]
    return [
        ["", "before", "after", ""],
        _gain("first token, LLaVA-1.5-7B shapes: 576 tokens, or 192", budgets["unpruned"], budgets["preset 192"]),
        _gain("first token, 0.3 B: Hugging Face in float32, or hivtp in int8 / int4 with 192", float32, rounded),
        _loss(json.loads((results / "accuracy.json").read_text(encoding="utf-8"))),
    ]


def answers(results: Path) -> Table:
    """A whole answer by system, on a CPU with AVX-512 VNNI and on one with AVX2 alone."""
    vnni, avx2 = (
        {table: _rows(results, name, table) for table in (FIRST_TOKEN, DECODE)}
        for name in ("ttft-cpu", "ttft-cpu-avx2")
    )
    head = ["vision / language", "first token, ms", "ratio", "decode, ms per token", "ratio", "peak GiB"]
    rows: list[list[str]] = [[*head, "AVX2: first token", "decode"]]
    for label, first in vnni[FIRST_TOKEN].items():
        decode = vnni[DECODE][label]
        here = [
            f"{median(first['values_ms']):,.0f}",
            _ratio(first),
            f"{median(decode['values_ms']):.3g}",
            _ratio(decode),
        ]
        memory = f"{first['peak_memory_bytes'] / 2**30:.2f}"
        rows.append([label, *here, memory, *(_ratio(avx2[table][label]) for table in (FIRST_TOKEN, DECODE))])
    return rows


def _trained(table: Callable[[Mapping[str, Any]], Table]) -> Callable[[Path], Table]:
    """A table of what was measured on trained weights."""

    def read(results: Path) -> Table:
        return table(json.loads((results / "trained-cpu.json").read_text(encoding="utf-8")))

    return read


TABLES: Mapping[str, Callable[[Path], Table]] = {
    "figures": figures,
    "answers": answers,
    "trained tower": _trained(vision_table),
    "trained language model": _trained(language_table),
}


def _rows(results: Path, name: str, table: str) -> dict[str, Any]:
    measured = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return {row["label"]: row for row in measured["rows"] if row["table"] == table}


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.2f}"


def _gain(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    times = [f"{median(row['values_ms']) / 1e3:.1f} s" for row in (before, after)]
    return [what, *times, f"{_ratio(after)} of the time"]


def _loss(measured: Mapping[str, Any]) -> list[str]:
    whole, half = measured["num_patches"], measured["num_patches"] // 2
    [before] = (found for found in measured["results"] if found["rule"] == UNPRUNED)
    [after] = (found for found in measured["results"] if (found["rule"], found["count"]) == (HIVTP, half))
    values = [found["accuracy"]["all"]["value"] for found in (before, after)]
    shown = [f"{value:.1f} %" for value in values]
    what = f"right answers, the trained miniature: {whole} tokens, or {half}"
    return [what, *shown, f"{values[0] - values[1]:.1f} points fewer"]
