"""What a comparison of bundles and engines is asked, and what it found."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from hivtp.engines import EngineName
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.runtime.vision.agreement import Agreement, VisionTolerance


# hivtp's own, one runner for each; `auto` is none of them.
ENGINES = (*(name for name in get_args(EngineName) if name != "auto"), "transformers")
# Polygraphy's own runners, for a second opinion on the same graph or plan.
POLYGRAPHY_ENGINES = ("polygraphy-onnxrt", "polygraphy-trt")
ALL_ENGINES = (*ENGINES, *POLYGRAPHY_ENGINES)


@dataclass(frozen=True)
class RunnerSettings:
    """How engines are opened.

    Attributes:
        checkpoint: the folder that the bundle was exported from, for the engine transformers.
        num_threads: of hivtp's engines on the CPU but transformers; None takes the physical cores.
        trust_plans: load a TensorRT plan that another machine built. A plan is code.
    """

    checkpoint: str | Path | None = None
    num_threads: int | None = None
    trust_plans: bool = False


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how.

    Attributes:
        engines: some of ALL_ENGINES.
        rounds: how often each image is timed in each engine.
        bounds: in place of those in the manifests; see VisionTolerance.
        runner: how engines are opened.

    Raises:
        SettingsError: there is no such engine, or less than one round.
    """

    engines: tuple[str, ...] = ALL_ENGINES
    rounds: int = 5
    bounds: Mapping[str, float] = field(default_factory=dict)
    runner: RunnerSettings = field(default_factory=RunnerSettings)

    def __post_init__(self) -> None:
        for name in self.engines or ("",):
            if name not in ALL_ENGINES:
                raise SettingsError(f"no engine is named {name!r}; there are {', '.join(ALL_ENGINES)}")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise SettingsError(f"rounds must be a whole number, 1 or more, not {self.rounds!r}")


@dataclass(frozen=True)
class Measurement:
    """One bundle in one engine.

    Attributes:
        agreement: with the reference, over all images; None for the reference itself.
        tolerance: how far from the reference it may be.
        kept_tokens: visual tokens of each image, over all its tiles and before packing.
        samples_ms: milliseconds of the vision graph, of each image in each round.
        peak_bytes: memory of the host that opening the engine and its first runs took; None where it is not counted.
    """

    agreement: Agreement | None
    tolerance: VisionTolerance
    kept_tokens: tuple[int, ...]
    samples_ms: tuple[tuple[float, ...], ...]
    peak_bytes: int | None

    @property
    def problems(self) -> list[str]:
        """What is beyond the tolerance; empty where nothing is."""
        return [] if self.agreement is None else self.tolerance.problems(self.agreement)

    @property
    def round_ms(self) -> list[float]:
        """Milliseconds per image, of each round."""
        return [statistics.fmean(images) for images in self.samples_ms]


@dataclass(frozen=True)
class System:
    """A bundle in an engine, and what came of it.

    Attributes:
        bundle: its folder.
        precision: of its vision graph.
        engine: the name.
        result: what was measured, or why the engine cannot run the bundle here.
    """

    bundle: Path
    precision: str
    engine: str
    result: Measurement | str

    @property
    def name(self) -> str:
        """Bundle and engine."""
        return f"{self.bundle} in {self.engine}"


@dataclass(frozen=True)
class Comparison:
    """All systems; the first that ran is the reference.

    Attributes:
        systems: bundle by bundle, engine by engine.
        num_images: how many images were compared and timed.
    """

    systems: tuple[System, ...]
    num_images: int

    @property
    def problems(self) -> list[str]:
        """Which systems are beyond their tolerance, and how."""
        return [
            f"{system.name}: {'; '.join(system.result.problems)}"
            for system in self.systems
            if isinstance(system.result, Measurement) and system.result.problems
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {"num_images": self.num_images, "systems": [_to_dict(system) for system in self.systems]}


def _to_dict(system: System) -> dict[str, Any]:
    names = {"bundle": str(system.bundle), "precision": system.precision, "engine": system.engine}
    result = system.result
    if isinstance(result, str):
        return {**names, "error": result}
    found = None if result.agreement is None else {name: _finite(x) for name, x in asdict(result.agreement).items()}
    return {
        **names,
        "is_reference": result.agreement is None,
        "agreement": found,
        "tolerance": asdict(result.tolerance),
        "problems": result.problems,
        "kept_tokens": result.kept_tokens,
        "latency_ms": {
            "median": statistics.median(result.round_ms),
            "min": min(result.round_ms),
            "samples": result.samples_ms,
        },
        "peak_bytes": result.peak_bytes,
    }


def _finite(value: float | None) -> float | None:
    # JSON has no NaN.
    return value if value is None or math.isfinite(value) else None
