"""Bundles and engines side by side on the same images: how close each is to a reference, and how fast it is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from hivtp.engines.bundle import Bundle
from hivtp.runtime.integrations.polygraphy.base import quiet_polygraphy, require_polygraphy
from hivtp.runtime.integrations.polygraphy.comparison import CompareSettings, Comparison, Measurement, System
from hivtp.runtime.integrations.polygraphy.images import image_feeds
from hivtp.runtime.integrations.polygraphy.kept_sets import KeptSets
from hivtp.runtime.integrations.polygraphy.memory import measure_peak_memory
from hivtp.runtime.integrations.polygraphy.runner import open_runner
from hivtp.runtime.vision.agreement import Agreement, compare_outputs
from hivtp_ops.errors import BundleError, EngineError, HivtpError, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.integrations.polygraphy.images import Feed
    from hivtp.runtime.vision.agreement import VisionTolerance

# Idle threads of one engine may still spin, and would take the cores of the next.
PAUSE_SECONDS = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class _Running:
    """A system that runs here."""

    runner: Any
    tolerance: VisionTolerance
    peak_bytes: int | None


def compare_bundles(
    folders: Sequence[str | Path], images: Sequence[ImageSource], settings: CompareSettings | None = None
) -> Comparison:
    """Run every bundle in every engine, and compare each with the first bundle in the first engine that runs it.

    Args:
        folders: bundles of one checkpoint.
        images: what all are given, prepared as the bundles say.
        settings: which engines, and how.

    Raises:
        MissingExtraError: Polygraphy is not installed.
        BundleError: a bundle is damaged, or holds an encoder graph, or is of another checkpoint than the first.
        ImageError: there is no image, or one cannot be read or is refused.
        EngineError: no engine can run here, or one that did fails on a later image.
    """
    settings = settings or CompareSettings()
    require_polygraphy()
    if not images:
        raise ImageError("there is nothing to compare without an image; give one or more")
    bundles = [Bundle.open(folder) for folder in folders]
    _check_one_checkpoint(bundles)
    feeds = image_feeds(bundles[0], images)
    pairs = [(bundle, engine) for bundle in bundles for engine in settings.engines]
    opened = [_open(*pair, place, settings, feeds) for place, pair in enumerate(_bar(pairs, "opening"))]
    running = [system for system in opened if isinstance(system, _Running)]
    if not running:
        reasons = "; ".join(f"{engine}: {error}" for (_, engine), error in zip(pairs, opened, strict=True))
        raise EngineError(f"no engine can run {', '.join(str(bundle.folder) for bundle in bundles)} here: {reasons}")
    measured = iter(_measure(running, bundles[0].manifest.vision.num_prefix_tokens, feeds, settings.rounds))
    # In one line, whatever a library says.
    results = [next(measured) if isinstance(system, _Running) else " ".join(str(system).split()) for system in opened]
    systems = [
        System(bundle.folder, bundle.manifest.vision.precision, engine, result)
        for (bundle, engine), result in zip(pairs, results, strict=True)
    ]
    return Comparison(tuple(systems), len(images))


def _check_one_checkpoint(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles whose outputs say nothing of each other."""
    first = bundles[0]
    for bundle in bundles:
        manifest = bundle.manifest
        if manifest.vision.graph != "vision":
            raise BundleError(
                f"{bundle.folder} holds an encoder graph, which keeps no patches; export it without --graph"
            )
        if manifest.source.fingerprint != first.manifest.source.fingerprint:
            raise BundleError(
                f"{bundle.folder} was exported from another checkpoint ({manifest.source.name}) than {first.folder} "
                f"({first.manifest.source.name}); compare bundles of one checkpoint"
            )
        if bundle.read_json("image_processor.json") != first.read_json("image_processor.json"):
            raise BundleError(f"{bundle.folder} prepares images otherwise than {first.folder}; export it again")


def _open(
    bundle: Bundle, engine: str, place: int, settings: CompareSettings, feeds: Sequence[Sequence[Feed]]
) -> _Running | HivtpError:
    """Open an engine and run it once with each number of tiles, which warms it up; or why that cannot be done."""
    prefix = bundle.manifest.vision.num_prefix_tokens
    try:
        with measure_peak_memory() as memory, quiet_polygraphy():
            # Polygraphy tells runners apart by their names.
            opened = open_runner(bundle, engine, settings.runner, f"{place}: {bundle.folder} in {engine}")
            with opened.runner as runner:
                for feed in {len(feed["pixel_values"]): feed for image in feeds for feed in image}.values():
                    outputs = runner.infer(_inputs_of(runner, feed))
                    # Refuses outputs of another kind: a bundle may come from a stranger.
                    compare_outputs(outputs, outputs, prefix)
    except HivtpError as error:
        return error
    return _Running(opened.runner, replace(opened.tolerance, **settings.bounds), memory.num_bytes)


def _measure(
    systems: Sequence[_Running], num_prefix_tokens: int, feeds: Sequence[Sequence[Feed]], rounds: int
) -> list[Measurement]:
    """Compare all systems with the first, then time them."""
    with quiet_polygraphy():
        agreements, counts = _compare(systems, [feed for image in feeds for feed in image], num_prefix_tokens)
        samples = _time(systems, feeds, rounds)
    return [
        Measurement(
            Agreement.over(agreements[place]) if place else None,
            system.tolerance.loosened(systems[0].tolerance),
            tuple(map(sum, _by_image(counts[place], feeds))),
            tuple(samples[place]),
            system.peak_bytes,
        )
        for place, system in enumerate(systems)
    ]


def _compare(
    systems: Sequence[_Running], runs: Sequence[Feed], num_prefix_tokens: int
) -> tuple[list[list[Agreement]], list[list[int]]]:
    """Of each system, run by run: how it agrees with the first, and how many tokens it keeps."""
    from polygraphy.comparator import Comparator

    agreements: list[list[Agreement]] = [[] for _ in systems]
    counts: list[list[int]] = [[] for _ in systems]
    compare = KeptSets(num_prefix_tokens, systems[0].tolerance)
    pairs = [(place, 0) for place in range(1, len(systems))]
    # A stream, so that the outputs of no more than one run are in memory.
    stream = Comparator.run([system.runner for system in systems], runs, streaming=True)
    for results in _bar(stream, "comparing", len(runs)):
        for place, (_, [outputs]) in enumerate(results):
            counts[place].append(_num_kept_tokens(outputs, num_prefix_tokens))
        [found] = Comparator.compare_accuracy(results, comparisons=pairs, compare_func=compare)
        for place, [run] in enumerate(found.values(), start=1):
            agreements[place].append(Agreement(**run["image_embeds"].metric_values()))
    return agreements, counts


def _time(systems: Sequence[_Running], feeds: Sequence[Sequence[Feed]], rounds: int) -> list[list[tuple[float, ...]]]:
    """Milliseconds of each system, round by round and image by image; the systems take turns."""
    samples: list[list[tuple[float, ...]]] = [[] for _ in systems]
    with ExitStack() as stack:
        runners = [stack.enter_context(system.runner) for system in systems]
        for _ in _bar(range(rounds), "timing"):
            for runner, taken in zip(runners, samples, strict=True):
                time.sleep(PAUSE_SECONDS)
                taken.append(tuple(sum(_milliseconds(runner, feed) for feed in image) for image in feeds))
    return samples


def _milliseconds(runner: Any, feed: Feed) -> float:
    runner.infer(_inputs_of(runner, feed))
    return float(runner.last_inference_time()) * 1e3


def _inputs_of(runner: Any, feed: Feed) -> Feed:
    """What a runner takes of a feed: a graph that prunes nothing has no mask."""
    return {name: feed[name] for name in runner.get_input_metadata(use_numpy_dtypes=False)}


def _num_kept_tokens(outputs: Mapping[str, Any], num_prefix_tokens: int) -> int:
    num_tiles, num_tokens = map(int, outputs["image_embeds"].shape[:2])
    if "kept_counts" not in outputs:
        return num_tiles * num_tokens
    return int(outputs["kept_counts"].sum()) + num_tiles * num_prefix_tokens


def _by_image(values: Sequence[int], feeds: Sequence[Sequence[Feed]]) -> Iterable[list[int]]:
    remaining = iter(values)
    return [[next(remaining) for _ in image] for image in feeds]


def _bar(items: Iterable[T], doing: str, total: int | None = None) -> Iterable[T]:
    """A progress bar, which is gone at the end; none where stderr is no terminal."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, doing, total, leave=False, disable=None)
    return bar
