"""Our systems as benchmarks.gpu.run times them: warm, and those of one language model in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.speed import throughput, ttft
from benchmarks.timing.hugging_face import DTYPES
from benchmarks.timing.shared_language import with_language_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.timing.harness import Pass, Sample
    from hivtp import Pipeline

# The first run of a shape compiles, the second records a CUDA graph, the third replays it.
NUM_WARM_UPS = 3


@dataclass(frozen=True)
class Variant:
    """One bundle in one engine.

    Attributes:
        name: of its row.
        bundle: its folder.
        engine: what runs its vision graph.
    """

    name: str
    bundle: Path
    engine: str


@dataclass(frozen=True)
class Language:
    """Where the language model of a checkpoint runs in transformers.

    Attributes:
        checkpoint: its folder.
        device: as torch names it.
        is_compiled: see Pipeline.load.
    """

    checkpoint: Path
    device: str
    is_compiled: bool = False

    def load(self, variant: Variant, num_threads: int, uses_cuda_graph: bool) -> Pipeline:
        """A pipeline with a language model of its own."""
        from hivtp import Pipeline

        return Pipeline.load(
            variant.bundle,
            engine=variant.engine,
            num_threads=num_threads,
            uses_cuda_graph=uses_cuda_graph,
            image_cache_bytes=0,
            language="transformers",
            checkpoint=self.checkpoint,
            language_device=self.device,
            language_dtype=DTYPES[self.device],  # type: ignore[arg-type]  # one of LanguageDtype
            language_compile=self.is_compiled,
        )


def open_warm(num_threads: int, open_system: Callable[..., Any], num_runs: int = 1, **arguments: Any) -> Any:
    """What `open_system` opens, warmed up; a pass is then the median of several runs, which keep a GPU awake."""
    opened = open_system(num_threads=num_threads, **arguments)
    if isinstance(opened, Mapping):
        return {name: repeated(run, num_runs) for name, run in opened.items()}
    return repeated(warmed(opened), num_runs)


def warmed(run: Pass) -> Pass:
    """The same pass, after the runs that prepare it."""
    for _ in range(NUM_WARM_UPS):
        run()
    return run


def repeated(run: Pass, num_runs: int) -> Pass:
    """A pass of several runs; its sample holds the median of each quantity."""

    def run_repeatedly() -> Sample:
        samples = [run() for _ in range(num_runs)]
        return {quantity: median(sample[quantity] for sample in samples) for quantity in samples[0]}

    return run_repeatedly


def open_answers(
    num_threads: int,
    variants: Sequence[Variant],
    language: Language,
    num_new_tokens: int,
    picture_size: tuple[int, int],
) -> dict[str, Pass]:
    """One answer about a new picture, from each variant."""
    return _open_variants(
        num_threads, variants, language, lambda pipeline: ttft.make_pass(pipeline, num_new_tokens, picture_size)
    )


def open_batches(
    num_threads: int, variants: Sequence[Variant], language: Language, batch_size: int, num_new_tokens: int
) -> dict[str, Pass]:
    """The answers of one batch, from each variant."""
    return _open_variants(
        num_threads, variants, language, lambda pipeline: throughput.make_pass(pipeline, batch_size, num_new_tokens)
    )


def _open_variants(
    num_threads: int, variants: Sequence[Variant], language: Language, make_pass: Callable[[Pipeline], Pass]
) -> dict[str, Pass]:
    """A warm pass of each variant; one that fails is named with its reason and left out.

    On a GPU the vision graph is recorded as a CUDA graph, or run without where that fails.
    """
    from hivtp.engines import EngineSettings

    first: Pipeline | None = None
    passes: dict[str, Pass] = {}
    for variant in variants:
        for uses_cuda_graph in (True, False) if language.device == "cuda" else (False,):
            try:
                if first is None:
                    pipeline = first = language.load(variant, num_threads, uses_cuda_graph)
                else:
                    settings = EngineSettings(num_threads, uses_cuda_graph)
                    pipeline = with_language_of(first, variant.bundle, settings, variant.engine)
                passes[variant.name] = warmed(make_pass(pipeline))
                break
            except Exception as error:  # noqa: BLE001  whatever it is, the others are timed
                way = " with a CUDA graph" if uses_cuda_graph else ""
                print(f"  {variant.name} is left out{way}: {error}", flush=True)
    return passes
