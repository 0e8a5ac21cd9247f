"""Where the time of an answer goes, stage by stage."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing.table import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.table import Table
    from benchmarks.timing.worker import Sample

# In their order. "vision" stands for the three before it where a system does not tell them apart.
STAGES = {
    "preprocess_ms": "preprocess",
    "tower_ms": "vision tower",
    "selection_ms": "selection",
    "projector_ms": "projector",
    "vision_ms": "vision",
    "prefill_ms": "prefill",
    "decode_ms": "decode",
}
TOKENS = "num_kept_tokens"
INSIDE_VISION = ("tower_ms", "selection_ms", "projector_ms")


def by_profile(title: str) -> str:
    """The name of the results that hold the profiles of the bundles in `title`'s."""
    return f"{title}, by profile"


def stages(
    samples: Mapping[str, Sequence[Sample]], profiles: Mapping[str, Sequence[Sample]]
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage, by system; and "num_kept_tokens", where it is known.

    Args:
        samples: by system. One that times its tower alone has no need of a profile.
        profiles: for bundles, the times inside their graph: its shares divide the time of their vision stage.
    """
    found = {}
    for system, passes in samples.items():
        times = {stage: median(sample[stage] for sample in passes) for stage in STAGES if stage in passes[0]}
        if "answer_ms" in passes[0]:
            times["decode_ms"] = median(sample["answer_ms"] - sample["ttft_ms"] for sample in passes)
        if system in profiles:
            [inside] = profiles[system]
            for stage in filter(inside.get, INSIDE_VISION):
                times[stage] = times["vision_ms"] * inside[stage] / inside["vision_ms"]
        if "tower_ms" in times:
            times.pop("vision_ms", None)
        found[system] = {stage: times[stage] for stage in STAGES if stage in times}
        if TOKENS in passes[0]:
            found[system][TOKENS] = median(sample[TOKENS] for sample in passes)
    return found


def stage_table(title: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    """A column for every stage that some system has, a dash where another lacks it."""
    titles = {TOKENS: "image tokens", **STAGES}
    columns = [name for name in titles if any(name in times for times in found.values())]
    rows = [[f"{title}: where the time goes, median ms", *(titles[name] for name in columns)]]
    for system, times in found.items():
        rows.append([system, *(number(times[name]) if name in times else "–" for name in columns)])
    return rows


def staged(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """`stages` of each of a script's results that tell stages apart, by title."""
    found = {}
    for title, result in results.items():
        samples, profiles = result["samples"], results.get(by_profile(title))
        if profiles is not None or any("prefill_ms" in sample for passes in samples.values() for sample in passes):
            found[title] = stages(samples, {} if profiles is None else profiles["samples"])
    return found
