"""Requests in a row, with the next pictures prepared ahead and without: `python -m benchmarks.speed.prefetch`."""

from __future__ import annotations

import argparse
import io
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.ttft import PROMPT
from benchmarks.timing.harness import Pass, Sample, Stopwatch, System, measure
from benchmarks.timing.record import Row, report
from benchmarks.timing.workspace import Workspace, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hivtp import Answer, HivtpError, Pipeline, Request

# Of a web page, and of a camera.
SIDES = {"JPEG 0.3 megapixels": (640, 480), "JPEG 12 megapixels": (4000, 3000)}
ONE_BY_ONE, AHEAD = "one by one", "prepared ahead"
NUM_REQUESTS = 6


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG file."""
    from PIL import Image

    blobs = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blobs).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def open_bundle(num_threads: int, bundle: Path, size: tuple[int, int], num_new_tokens: int, is_ahead: bool) -> Pass:
    """A pipeline that answers requests in a row."""
    from hivtp import Pipeline, Request

    # Without the cache, so that every request pays for its picture.
    pipeline = Pipeline.load(bundle, num_threads=num_threads, image_cache_bytes=0)
    requests = [Request(PROMPT, [picture(seed, size)], num_new_tokens) for seed in range(NUM_REQUESTS)]

    def run() -> Sample:
        with Stopwatch() as total:
            answers = list(pipeline.generate_each(requests) if is_ahead else one_by_one(pipeline, requests))
        # Errors have no timings, and would end the measurement here.
        ttft = [answer.timings.ttft_ms for answer in answers]  # type: ignore[union-attr]
        return {"answer_ms": total.ms / NUM_REQUESTS, "ttft_ms": float(np.mean(ttft))}

    return run


def one_by_one(pipeline: Pipeline, requests: Sequence[Request]) -> Iterator[Answer | HivtpError]:
    """What `generate_each` is compared with."""
    for request in requests:
        yield pipeline.generate(request.prompt, request.images, max_new_tokens=request.max_new_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "lookahead.json")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answers (default: %(default)s)")
    options = parser.parse_args(arguments)
    bundle = Workspace.open(options, "answers").bundle("fp32 / fp32, preset 192", ExportSettings(preset="192"))
    tables, found = {}, {}
    for title, size in SIDES.items():
        settings = {"bundle": bundle, "size": size, "num_new_tokens": options.new_tokens}
        systems = [System(name, open_bundle, {**settings, "is_ahead": name == AHEAD}) for name in (ONE_BY_ONE, AHEAD)]
        found[title] = measure(systems, options.rounds, options.threads)
        for quantity, label in (("answer_ms", "ms per answer"), ("ttft_ms", "time to first token")):
            tables[f"{title}, {label}"] = [
                Row.of(found[title], name, quantity, ONE_BY_ONE) for name in (ONE_BY_ONE, AHEAD)
            ]
    report(options, tables, found)


if __name__ == "__main__":
    main()
