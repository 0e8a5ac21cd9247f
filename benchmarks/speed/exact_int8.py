"""What exact products of 8 bits cost, and what inexact ones would: `python -m benchmarks.speed.exact_int8`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.timing.graph_profile import pixels
from benchmarks.timing.harness import Stopwatch, measure
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_options
from hivtp.engines.int8 import overflows_int8
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.timing.worker import Pass, Sample

FLOAT = "fp32"
USUAL = "int8, the usual kernels"
EXACT = "int8, the exact kernels"
BUNDLES = {
    "fp32, preset 192, vision alone": ExportSettings(preset="192", language_precision="none"),
    "int8, preset 192, vision alone": ExportSettings(preset="192", vision_precision="int8", language_precision="none"),
}


def write_outputs(bundle: Path, file: Path) -> None:
    """What the vision graph of a bundle gives, for the others to be compared with; they need not hold it in memory."""
    from hivtp.engines import create_engine
    from hivtp.engines.bundle import Bundle

    opened = Bundle.open(bundle)
    inputs = {"pixel_values": pixels(1, opened.manifest.vision.image_size)}
    np.savez(file, **create_engine("onnxruntime", opened.vision_file).run(inputs))


def open_graph(num_threads: int, bundle: Path, reference: Path, is_exact: bool) -> Pass:
    """The vision graph of a bundle in ONNX Runtime, and how far its outputs are from those in a file.

    Args:
        num_threads: of the engine.
        bundle: what is timed.
        reference: the file of write_outputs, of float32.
        is_exact: as on a processor whose usual products of 8 bits are cut off; False as on any other.
    """
    from hivtp.engines import EngineSettings, create_engine, onnxruntime
    from hivtp.engines.bundle import Bundle
    from hivtp.export.verify.checks import jaccard, relative_error

    # Only in this process, which runs nothing else.
    onnxruntime.overflows_int8 = lambda: is_exact
    opened, settings = Bundle.open(bundle), EngineSettings(num_threads)
    inputs = {"pixel_values": pixels(1, opened.manifest.vision.image_size)}
    expected = np.load(reference)
    engine = create_engine("onnxruntime", opened.vision_file, settings)

    def run() -> Sample:
        with Stopwatch() as watch:
            found = engine.run(inputs)
        return {
            "vision_ms": watch.ms,
            # Scores are of all patches; embeddings are of those that each keeps.
            "relative_importance_error": relative_error(found["importance"], expected["importance"]),
            "kept_jaccard": jaccard(found["kept_indices"], expected["kept_indices"]),
        }

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "exact-int8.json")
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "latency", text={"num_hidden_layers": 1})
    float_bundle, int8_bundle = workspace.bundles(BUNDLES).values()
    reference = workspace.folder / "fp32-outputs.npz"
    write_outputs(float_bundle, reference)
    systems = [
        System(name, open_graph, {"bundle": bundle, "reference": reference, "is_exact": is_exact})
        for name, bundle, is_exact in (
            (FLOAT, float_bundle, False),
            (USUAL, int8_bundle, False),
            (EXACT, int8_bundle, True),
        )
    ]
    results = measure(systems, options.rounds, options.threads)
    rows = [Row.of(results, name, "vision_ms", FLOAT) for name in results.samples]
    report(options, {"vision stage, preset 192": rows}, {"vision": results})
    print(f"\nthe usual kernels are {'inexact' if overflows_int8() else 'exact'} on this processor")
    for name, [sample, *_] in results.samples.items():
        error, agreement = sample["relative_importance_error"], sample["kept_jaccard"]
        print(f"{name:<{len(EXACT)}}  relative error of the scores {error:.2e}, kept-token agreement {agreement:.1%}")


if __name__ == "__main__":
    main()
