"""The tables of one file of results, in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.speed.throughput import rates
from benchmarks.timing.record import time_table
from benchmarks.timing.stages import by_profile, stage_table, stages
from benchmarks.timing.table import markdown

if TYPE_CHECKING:
    from collections.abc import Mapping


def tables(measured: Mapping[str, Any]) -> str:
    """Where one file of results was measured, and all its tables."""
    titles = dict.fromkeys(row["table"] for row in measured["rows"])
    timed = {title: [row for row in measured["rows"] if row["table"] == title] for title in titles}
    parts = [_origin(measured), *_lengths(measured)]
    parts += [markdown(time_table(title, rows)) for title, rows in timed.items()]
    for title, found in staged(measured).items():
        [[what, *columns], *rows] = stage_table(found)
        parts.append(markdown([[f"{title}: {what}", *columns], *rows]))
    by_size = [result["samples"] for result in measured["results"].values() if _has(result, "answers_per_s")]
    if by_size:
        parts.append(markdown(rates(by_size)))
    return "\n\n".join(parts)


def staged(measured: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the stages by system, for each of the results that tell stages apart."""
    results, found = measured["results"], {}
    for title, result in results.items():
        if by_profile(title) in results or _has(result, "prefill_ms"):
            profiles = results.get(by_profile(title), {"samples": {}})
            found[title] = stages(result["samples"], profiles["samples"])
    return found


def _origin(measured: Mapping[str, Any]) -> str:
    found = measured["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    sets = found.get("instruction_sets", [])
    cpu = found["cpu"] + (f" ({', '.join(sets)})" if sets else "")
    machine = ", ".join([cpu, *([found["gpu"]] if "gpu" in found else [])])
    return f"{machine}, {found['num_threads']} threads, {found['date'][:10]}; {packages}."


def _lengths(measured: Mapping[str, Any]) -> list[str]:
    """The lengths of prompt and answers, where the samples say both."""
    samples = [
        sample for result in measured["results"].values() for passes in result["samples"].values() for sample in passes
    ]
    known = [sample for sample in samples if {"num_text_tokens", "num_image_tokens"} <= sample.keys()]
    if not known:
        return []
    lengths = sorted({int(sample["num_new_tokens"]) for sample in samples if "num_new_tokens" in sample})
    answers = " to ".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
    prompt = f"{known[0]['num_image_tokens']:.0f} tokens of the image before pruning, and"
    return [f"Prompts: {prompt} {known[0]['num_text_tokens']:.0f} of text. Answers: {answers} tokens."]


def _has(result: Mapping[str, Any], quantity: str) -> bool:
    return any(quantity in sample for passes in result["samples"].values() for sample in passes)
