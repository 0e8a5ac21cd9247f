"""The demo: the trained miniature, unpruned and pruned, asked about pictures whose answers are known."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.miniature.evaluate import SAMPLING
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, draw
from benchmarks.miniature.scores import BUDGETS, chosen_layers, settings_of
from benchmarks.pipelines import load_pipeline
from benchmarks.timing.table import aligned
from hivtp.export.exporter import export_bundle
from hivtp.export.summary import summary
from hivtp.runtime.cli.files import write_overlays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.timing.table import Table
    from hivtp import Answer, Pipeline

SHOWN = ("unpruned", "50 %", "11 %")
NUM_PICTURES = 3
NUM_ROUNDS = 5
COLUMNS = {
    "preprocess_ms": "preprocess",
    "vision_ms": "vision",
    "prefill_ms": "prefill",
    "ttft_ms": "first token",
    "decode_ms_per_token": "decode/token",
}


@dataclass(frozen=True)
class Asked:
    """A question about an image file, and its right answer where one is known."""

    image: Path
    question: str
    right_answer: str | None


def drawn_questions(folder: Path) -> list[Asked]:
    """Draw the first held-out pictures into a folder; returns all their questions."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for index, seed in enumerate(HELD_OUT[:NUM_PICTURES], start=1):
        picture, file = draw(seed), folder / f"picture-{index}.png"
        picture.image.save(file)
        asked += [Asked(file, question.text, question.answer) for question in picture.questions]
    return asked


def questions_about(image: Path) -> list[Asked]:
    """Questions about a photo, to which no answer is known."""
    texts = ("What colour is the circle?", "Where is the circle?", "How many shapes are there?")
    return [Asked(image, text, None) for text in texts]


def measure(pipeline: Pipeline, asked: Sequence[Asked]) -> list[list[Answer]]:
    """Ask every question several times; the first round warms up and is left out."""
    rounds = [
        [pipeline.generate(item.question, [item.image], SAMPLING) for item in asked] for _ in range(NUM_ROUNDS + 1)
    ]
    return rounds[1:]


def time_table(asked: Sequence[Asked], results: Mapping[str, list[list[Answer]]]) -> Table:
    """Visual tokens, median times and right answers of each bundle."""
    is_known = all(item.right_answer is not None for item in asked)
    rows = [["milliseconds, medians", "tokens", *COLUMNS.values(), *(["right answers"] if is_known else [])]]
    for name, rounds in results.items():
        answers = [answer for answers in rounds for answer in answers]
        row = [name, f"{answers[0].num_image_tokens} -> {answers[0].num_kept_tokens}"]
        row += [f"{median(getattr(answer.timings, column) or 0.0 for answer in answers):.2f}" for column in COLUMNS]
        if is_known:
            num_right = sum(item.right_answer == answer.text for item, answer in zip(asked, rounds[0], strict=True))
            row.append(f"{num_right} of {len(asked)}")
        rows.append(row)
    return rows


def conversation(asked: Sequence[Asked], results: Mapping[str, list[list[Answer]]]) -> Table:
    """Every question with the right answer and the answer of each bundle; a wrong one is marked."""
    rows = [["image", "question", "right", *results]]
    for index, item in enumerate(asked):
        answers = [rounds[0][index].text for rounds in results.values()]
        marked = [answer if item.right_answer in {None, answer} else f"{answer}  ✗" for answer in answers]
        rows.append([item.image.name, item.question, item.right_answer or "?", *marked])
    return rows


def draw_kept(pipeline: Pipeline, image: Path, target: Path) -> Path:
    """Write the image, enlarged, with what pruning kept; returns the file."""
    stream = pipeline.stream("How many shapes are there?", [image], SAMPLING)
    list(stream)
    return write_overlays(pipeline.model, stream.images, [image], target)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, default=None, help="a photo (default: drawn pictures)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that is written")
    options = parser.parse_args(arguments)
    asked = questions_about(options.image) if options.image else drawn_questions(options.output)
    image, layers = asked[0].image, chosen_layers()

    print("== the miniature: a LLaVA of 1.2 million parameters, trained on drawn pictures")
    results = {}
    for name in SHOWN:
        print(f"\n== {name}")
        number, settings = name.replace(" %", ""), replace(settings_of(BUDGETS[name], layers), overwrite=True)
        bundle = export_bundle(CHECKPOINT, options.output / f"bundle-{number}", settings, is_quiet=True)
        print(summary(bundle, CHECKPOINT))
        # Without the cache, so that every question pays for its image.
        with load_pipeline(bundle.folder, cache_bytes=0) as pipeline:
            results[name] = measure(pipeline, asked)
            if settings.is_pruned:
                print(f"  kept tokens: {draw_kept(pipeline, image, options.output / f'kept-{number}.png')}")
    print(f"\n{aligned(conversation(asked, results))}")
    if options.image:
        print("\nThe miniature has seen drawn pictures only, so its answers about a photo mean nothing.")
    print(f"\nTry it: hivtp run {options.output}/bundle-50 --image {image} 'How many shapes are there?'")
    print(f"\n{aligned(time_table(asked, results))}")


if __name__ == "__main__":
    main()
