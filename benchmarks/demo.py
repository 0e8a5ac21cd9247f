"""The demo: the trained miniature, unpruned and pruned, asked about pictures whose answers are known."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.miniature.evaluate import MAX_NEW_TOKENS
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, draw
from benchmarks.miniature.scores import BUDGETS, chosen_layers, settings_of
from hivtp import Answer, Pipeline
from hivtp.export.cli.export import summary
from hivtp.export.exporter import export_bundle
from hivtp.runtime.cli.run import write_overlays

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOWN = ("unpruned", "50 %", "11 %")
NUM_PICTURES = 3
NUM_ROUNDS = 5


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


def measure(pipeline: Pipeline, asked: list[Asked]) -> list[list[Answer]]:
    """Ask every question several times; the first round warms up and is left out."""
    rounds = [
        [pipeline.generate(item.question, [item.image], max_new_tokens=MAX_NEW_TOKENS) for item in asked]
        for _ in range(NUM_ROUNDS + 1)
    ]
    return rounds[1:]


def num_right(asked: list[Asked], answers: list[Answer]) -> int:
    """How many answers are right."""
    return sum(item.right_answer == answer.text for item, answer in zip(asked, answers, strict=True))


def table(asked: list[Asked], results: dict[str, list[list[Answer]]]) -> str:
    """Visual tokens, median times and right answers of each bundle."""
    columns = ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token")
    heads = ("preprocess", "vision", "prefill", "first token", "decode/token")
    is_known = all(item.right_answer is not None for item in asked)
    lines = [
        f"{'bundle':<10} {'tokens':>11} "
        + " ".join(f"{head:>12}" for head in heads)
        + f"   (ms, medians){'   right answers' if is_known else ''}"
    ]
    for name, rounds in results.items():
        answers = [answer for answers in rounds for answer in answers]
        tokens = f"{answers[0].num_image_tokens} -> {answers[0].num_kept_tokens}"
        times = [median(getattr(answer.timings, column) or 0.0 for answer in answers) for column in columns]
        right = f"{'':15}{num_right(asked, rounds[0]):>10} of {len(asked)}" if is_known else ""
        lines.append(f"{name:<10} {tokens:>11} " + " ".join(f"{time:12.2f}" for time in times) + right)
    return "\n".join(lines)


def conversation(asked: list[Asked], results: dict[str, list[list[Answer]]]) -> Iterator[str]:
    """Every question with the right answer and the answer of each bundle; a wrong one is marked."""
    for index, item in enumerate(asked):
        if index == 0 or item.image != asked[index - 1].image:
            yield f"\n{item.image}"
            yield f"  {'':<42} {'right':<14}" + "".join(f"{name:<16}" for name in results)
        answers = [rounds[0][index].text for rounds in results.values()]
        marks = ["" if item.right_answer in {None, answer} else "  ✗" for answer in answers]
        shown = "".join(f"{answer + mark:<16}" for answer, mark in zip(answers, marks, strict=True))
        yield f"  {item.question:<42} {item.right_answer or '?':<14}{shown}"


def draw_kept(pipeline: Pipeline, image: Path, target: Path) -> Path:
    """Write the picture, enlarged, with what pruning kept; returns the file."""
    stream = pipeline.stream("How many shapes are there?", [image], max_new_tokens=1)
    list(stream)
    return write_overlays(pipeline, stream, [image], target)[0]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, default=None, help="a photo (default: drawn pictures)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that is written")
    options = parser.parse_args()
    asked = questions_about(options.image) if options.image else drawn_questions(options.output)
    image, layers = asked[0].image, chosen_layers()

    print("== the miniature: a LLaVA of 1.2 million parameters, trained on drawn pictures")
    results = {}
    for name in SHOWN:
        print(f"\n== {name}")
        settings = replace(settings_of(BUDGETS[name], layers), overwrite=True)
        folder = options.output / f"bundle-{name.replace(' %', '')}"
        print(summary(export_bundle(CHECKPOINT, folder, settings, is_quiet=True), CHECKPOINT))
        # Without the cache, so that every question pays for its picture.
        pipeline = Pipeline.load(folder, image_cache_bytes=0)
        results[name] = measure(pipeline, asked)
        if settings.is_pruned:
            kept = draw_kept(pipeline, image, options.output / f"kept-{name.replace(' %', '')}.png")
            print(f"  kept tokens: {kept}")
    print("\n".join(conversation(asked, results)))
    print(f"\n{table(asked, results)}")
    if options.image:
        print("\nThe miniature has seen drawn pictures only, so its answers about a photo mean nothing.")
    print(f"\nTry it: hivtp-run {options.output}/bundle-50 --image {image} 'How many shapes are there?'")


if __name__ == "__main__":
    main()
