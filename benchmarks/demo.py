"""The demo: a small checkpoint, exported with and without pruning, asked about an image file."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from statistics import median

from benchmarks.checkpoints import make_checkpoint
from hivtp import Answer, Pipeline
from hivtp.export.cli import summary
from hivtp.export.exporter import ExportSettings, export_bundle
from hivtp.runtime.cli import write_overlays

QUESTIONS = ("What is in the picture?", "What colour is the large shape?", "How many people are there?")
BUNDLES = {
    "unpruned": ExportSettings(is_pruned=False, overwrite=True),
    "paper": ExportSettings(preset="paper", overwrite=True),
    "preset 64": ExportSettings(preset="64", overwrite=True),
}
NUM_ROUNDS = 5


def default_image() -> Path:
    """The photograph of an astronaut that scikit-image ships."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is not installed; give a photo with --image")
    return Path(spec.origin).parent / "data" / "astronaut.png"


def measure(pipeline: Pipeline, image: Path) -> list[Answer]:
    """Ask every question several times; the first round warms up and is left out."""
    rounds = [
        [pipeline.generate(question, [image], max_new_tokens=16) for question in QUESTIONS]
        for _ in range(NUM_ROUNDS + 1)
    ]
    return [answer for answers in rounds[1:] for answer in answers]


def table(results: dict[str, list[Answer]]) -> str:
    """Visual tokens and median times of each bundle."""
    columns = ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token")
    heads = ("preprocess", "vision", "prefill", "first token", "decode/token")
    lines = [f"{'bundle':<10} {'tokens':>11} " + " ".join(f"{head:>12}" for head in heads) + "   (ms, medians)"]
    for name, answers in results.items():
        tokens = f"{answers[0].num_image_tokens} -> {answers[0].num_kept_tokens}"
        times = [median(getattr(answer.timings, column) or 0.0 for answer in answers) for column in columns]
        lines.append(f"{name:<10} {tokens:>11} " + " ".join(f"{time:12.1f}" for time in times))
    return "\n".join(lines)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, default=None, help="a photo (default: one that scikit-image ships)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that is written")
    options = parser.parse_args()
    image = options.image or default_image()

    print("== a small LLaVA-1.5 checkpoint with random weights")
    checkpoint = make_checkpoint(options.output / "checkpoint", "demo")
    results = {}
    for name, settings in BUNDLES.items():
        print(f"\n== {name}")
        folder = options.output / f"bundle-{name.replace(' ', '-')}"
        print(summary(export_bundle(checkpoint, folder, settings, is_quiet=True)))
        # Without the cache, so that every question pays for its picture.
        pipeline = Pipeline.load(folder, image_cache_bytes=0)
        results[name] = measure(pipeline, image)
        for question, answer in zip(QUESTIONS, results[name], strict=False):
            print(f"  {question}  ->  {answer.text!r}")
        if settings.is_pruned:
            stream = pipeline.stream(QUESTIONS[0], [image], max_new_tokens=1)
            list(stream)
            picture = options.output / f"kept-{name.replace(' ', '-')}.png"
            print(f"  kept tokens: {write_overlays(pipeline, stream, [image], picture)[0]}")
    print(f"\n{table(results)}")
    print(
        "\nThe weights are random, so the answers mean nothing; token counts and times are real."
        f"\nTry it: hivtp-run {options.output}/bundle-paper --image {image} 'What is in the picture?'"
    )


if __name__ == "__main__":
    main()
