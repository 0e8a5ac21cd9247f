"""Where something was measured, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def place_of(environment: Mapping[str, Any]) -> str:
    """The machine, the date and the versions of what `environment` wrote."""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    sets = environment.get("instruction_sets", [])
    cpu = environment["cpu"] + (f" ({', '.join(sets)})" if sets else "")
    machine = ", ".join([cpu, *([environment["gpu"]] if "gpu" in environment else [])])
    return f"{machine}, {environment['num_threads']} threads, {environment['date'][:10]}; {packages}."
