"""Tables of the page of results, in Markdown, from the JSON that the scripts wrote."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.ablation import by_setting
from benchmarks.accuracy.comparison import UNPRUNED
from benchmarks.accuracy.intervals import Score
from benchmarks.gpu.goals import goal_table
from benchmarks.speed.throughput import rates
from benchmarks.timing.stages import by_profile, number, stages, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def markdown(measured: Mapping[str, Any]) -> str:
    """Where one file of results was measured, and all its tables."""
    parts = [_origin(measured), *_lengths(measured)]
    titles = dict.fromkeys(row["table"] for row in measured["rows"])
    parts += [_grid(_times(title, [row for row in measured["rows"] if row["table"] == title])) for title in titles]
    for title, found in staged(measured).items():
        [head, *rows] = table(found)
        parts.append(_grid([[f"{title}: {head[0]}", *head[1:]], *rows]))
    by_size = [result["samples"] for result in measured["results"].values() if _has(result, "answers_per_s")]
    if by_size:
        parts.append(_grid(rates(by_size)))
    return "\n\n".join(parts)


def gpu(measured: Mapping[str, Any]) -> str:
    """What benchmarks.gpu.run wrote: the goals of all parts that it measured, and then each part."""
    parts = measured["parts"]
    goals_of_all = [goal for part in parts.values() for goal in part["goals"]]
    texts = [f"### {name}\n\n{markdown(part)}" for name, part in parts.items()]
    return "\n\n".join([_grid(goal_table(goals_of_all)), *texts])


def staged(measured: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the stages by system, for each of the results that tell stages apart."""
    results, found = measured["results"], {}
    for title, result in results.items():
        if by_profile(title) in results or _has(result, "prefill_ms"):
            profiles = results.get(by_profile(title), {"samples": {}})
            found[title] = stages(result["samples"], profiles["samples"])
    return found


def accuracy(measured: Mapping[str, Any]) -> str:
    """Accuracy of every rule by count, all questions, with half of its 95 % interval."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in measured["results"]:
        found.setdefault(result["rule"], {})[result["count"]] = result["accuracy"]["all"]
    [whole] = found.pop(UNPRUNED).values()
    counts = sorted({count for scores in found.values() for count in scores}, reverse=True)
    asked = f"{measured['num_questions']:,} questions on {measured['num_pictures']:,} held-out pictures; percent right."
    lines = [
        f"{asked} Unpruned, {measured['num_patches']} tokens: {whole['value']:.1f}.",
        "",
        f"| rule, tokens kept | {' | '.join(map(str, counts))} |",
        "|---|" + "---|" * len(counts),
    ]
    for rule, scores in found.items():
        cells = [_with_margin(scores[count]) for count in counts]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(measured: Mapping[str, Any]) -> str:
    """What was to be reached, and whether it is."""
    rows = [["goal", "found", ""]]
    for goal in measured["goals"]:
        asked = f"{goal['text']}: {goal['sense']} {goal['bound']:g}"
        rows.append([asked, str(Score(**goal["score"])), "reached" if goal["is_reached"] else "missed"])
    return _grid(rows)


def ablation(measured: Mapping[str, Any]) -> str:
    """Accuracy by value and count, for each setting of HIVTP; bold where the value is the one in use."""
    tables = []
    for setting, counts, trials in by_setting(measured["ablation"]):
        rows = [[f"{setting}, tokens kept", *map(str, counts)]]
        rows += [[value, *map(_ablated, found)] for value, found in trials.items()]
        tables.append(_grid(rows))
    return "\n\n".join(tables)


def _ablated(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['accuracy']['value']:.1f}"
    return f"**{text}**" if row["is_default"] else text


def parity(measured: Mapping[str, Any]) -> str:
    """Bundles beside PyTorch, and whether the goals are met."""
    rows = [["", "right, percent", "kept alike, percent", "same answers, percent"]]
    for name, row in measured["systems"].items():
        rows.append([name, _with_margin(row["accuracy"]), f"{row['kept_alike']:.3f}", f"{row['same_answers']:.2f}"])
    asked = f"{measured['num_questions']:,} questions on {measured['num_pictures']:,} held-out pictures"
    return f"{asked}; {measured['num_kept']} tokens kept.\n\n{_grid(rows)}"


def _with_margin(score: Mapping[str, float]) -> str:
    return f"{score['value']:.1f} ± {(score['high'] - score['low']) / 2:.1f}"


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
    prompt = f"{known[0]['num_image_tokens']:.0f} tokens of the image before pruning, and of text"
    return [f"Prompts: {prompt} {known[0]['num_text_tokens']:.0f}. Answers: {answers} tokens."]


def _times(title: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    has_memory = any(row.get("peak_memory_bytes") for row in rows)
    has_floor = any(row.get("over_floor") for row in rows)
    columns = [
        *(["time / floor", "ratio at floor"] if has_floor else []),
        *(["peak GiB"] if has_memory else []),
    ]
    found = [[title, "median ms", "min", "max", "ratio", *columns, "goal"]]
    for row in rows:
        values = row["values_ms"]
        times = [number(value) for value in (median(values), min(values), max(values))]
        floor = [_or_dash(row.get("over_floor")), _or_dash(row.get("least_ratio"))] if has_floor else []
        memory = [f"{row['peak_memory_bytes'] / 2**30:.2f}"] if has_memory else []
        goal = "" if row["goal"] is None else f"{row['goal']:g}, {row['verdict']}"
        found.append([row["label"], *times, f"{row['ratio']:.4g}", *floor, *memory, goal])
    return found


def _or_dash(ratio: float | None) -> str:
    return "–" if ratio is None else number(ratio)


def _has(result: Mapping[str, Any], quantity: str) -> bool:
    return any(quantity in sample for passes in result["samples"].values() for sample in passes)


def _grid(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
