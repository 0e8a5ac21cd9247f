"""Requests in a row, with the next image prefetched and without: `python -m benchmarks.speed.prefetch`."""

from __future__ import annotations

import argparse
import io
import itertools
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.ttft import BUNDLES, FLOAT, PROMPT, drawn_images
from benchmarks.timing.harness import Stopwatch, measure
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_options
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from benchmarks.timing.worker import Pass, Sample

# Of a web page, and of a camera.
SIDES = {"JPEG 0.3 megapixels": (640, 480), "JPEG 12 megapixels": (4000, 3000)}
ONE_BY_ONE, PREFETCH = "one by one", "prefetch"
NUM_REQUESTS = 6


def jpeg(image: Image.Image) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def open_bundle(num_threads: int, bundle: Path, size: tuple[int, int], num_new_tokens: int, is_ahead: bool) -> Pass:
    """A pipeline that answers requests in a row: with `generate_each`, or each with `generate`."""
    from benchmarks.pipelines import load_pipeline
    from hivtp import Request, SamplingParams

    # Without the cache, so that every request pays for its image.
    pipeline = load_pipeline(bundle, num_threads, cache_bytes=0)
    sampling = SamplingParams(max_new_tokens=num_new_tokens)
    files = [jpeg(image) for image in itertools.islice(drawn_images(size), NUM_REQUESTS)]
    requests = [Request(PROMPT, [file], sampling) for file in files]

    def run() -> Sample:
        with Stopwatch() as total:
            answers = list(pipeline.generate_each(requests) if is_ahead else map(pipeline.generate, requests))
        ttft_ms = []
        for answer in answers:
            if isinstance(answer, HivtpError):
                raise answer
            ttft_ms.append(answer.timings.ttft_ms)
        return {"answer_ms": total.ms / NUM_REQUESTS, "ttft_ms": float(np.mean(ttft_ms))}

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "prefetch.json")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answers (default: %(default)s)")
    options = parser.parse_args(arguments)
    bundle = Workspace.open(options, "answers").bundle(FLOAT, BUNDLES[FLOAT])
    tables, found = {}, {}
    for title, size in SIDES.items():
        settings = {"bundle": bundle, "size": size, "num_new_tokens": options.new_tokens}
        systems = [
            System(name, open_bundle, {**settings, "is_ahead": name == PREFETCH}) for name in (ONE_BY_ONE, PREFETCH)
        ]
        found[title] = measure(systems, options.rounds, options.threads)
        for quantity, label in (("answer_ms", "ms per answer"), ("ttft_ms", "time to first token")):
            tables[f"{title}, {label}"] = [
                Row.of(found[title], name, quantity, ONE_BY_ONE) for name in (ONE_BY_ONE, PREFETCH)
            ]
    report(options, tables, found)


if __name__ == "__main__":
    main()
