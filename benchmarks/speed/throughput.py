"""Answers per second in batches, our bundles against Hugging Face: `python -m benchmarks.speed.throughput`."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from benchmarks.speed.ttft import BUNDLES, FLOAT, FLOAT_UNPRUNED, PROMPT, QUANTIZED, drawn_images
from benchmarks.timing.harness import Stopwatch, measure
from benchmarks.timing.hugging_face import UNPRUNED, chat_prompt, load
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_options
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from benchmarks.timing.worker import Pass, Sample

TIMED = (FLOAT_UNPRUNED, FLOAT, QUANTIZED)
# Of several lengths, as those that come together by chance.
QUESTIONS = (
    PROMPT,
    "What is in the picture?",
    "How many people are there in front of the house?",
    "Describe the car.",
)
SIZE = ", batch size: "


def questions() -> Iterator[tuple[str, Image.Image]]:
    """Questions in turn, each about an image of its own."""
    return zip(itertools.cycle(QUESTIONS), drawn_images(), strict=False)


def open_hugging_face(num_threads: int, checkpoint: Path, batch_size: int, num_new_tokens: int) -> Pass:
    """The checkpoint's own processor, padding on the left, and one `generate` for the batch."""
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    # Masked, so that any will do where a checkpoint has none.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(checkpoint, num_threads)
    eos = model.generation_config.eos_token_id
    asked = questions()

    def run() -> Sample:
        batch = list(itertools.islice(asked, batch_size))
        with torch.inference_mode(), Stopwatch() as watch:
            prompts = [chat_prompt(processor, question) for question, _ in batch]
            images = [[image] for _, image in batch]
            inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
            settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            output = model.generate(**inputs, max_new_tokens=num_new_tokens, **settings)
            answers = output[:, inputs["input_ids"].shape[1] :].tolist()
            processor.batch_decode(answers, skip_special_tokens=True)
        # What follows an eos is padding.
        lengths = [answer.index(eos) + 1 if eos in answer else len(answer) for answer in answers]
        return sample_of(batch_size, sum(lengths), watch.ms)

    return run


def open_bundle(num_threads: int, bundle: Path, batch_size: int, num_new_tokens: int) -> Pass:
    """`Pipeline.generate_batch`, each request about a new image."""
    from benchmarks.pipelines import load_pipeline
    from hivtp import Request, SamplingParams

    pipeline, asked = load_pipeline(bundle, num_threads), questions()
    sampling = SamplingParams(max_new_tokens=num_new_tokens)

    def run() -> Sample:
        batch = [Request(question, [image], sampling) for question, image in itertools.islice(asked, batch_size)]
        with Stopwatch() as watch:
            answers = pipeline.generate_batch(batch)
        num_new = 0
        for answer in answers:
            if isinstance(answer, HivtpError):
                raise answer
            num_new += len(answer.token_ids)
        return sample_of(batch_size, num_new, watch.ms)

    return run


def sample_of(batch_size: int, num_new_tokens: int, batch_ms: float) -> Sample:
    """What one batch says."""
    return {
        "batch_size": batch_size,
        "batch_ms": batch_ms,
        "num_new_tokens": num_new_tokens,
        "answers_per_s": batch_size * 1e3 / batch_ms,
        "tokens_per_s": num_new_tokens * 1e3 / batch_ms,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "throughput.json")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8], help="(default: 1 4 8)")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of an answer (default: %(default)s)")
    options = parser.parse_args(arguments)
    # The bundles are those of benchmarks.speed.ttft.
    workspace = Workspace.open(options, "answers")
    bundles = workspace.bundles({name: BUNDLES[name] for name in TIMED})
    tables, results = {}, {}
    for batch_size in options.batch_sizes:
        title = f"throughput{SIZE}{batch_size}"
        print(title)
        asked = {"batch_size": batch_size, "num_new_tokens": options.new_tokens}
        systems = [
            System(UNPRUNED, open_hugging_face, {"checkpoint": workspace.checkpoint, **asked}),
            *(System(name, open_bundle, {"bundle": bundle, **asked}) for name, bundle in bundles.items()),
        ]
        found = results[title] = measure(systems, options.rounds, options.threads)
        tables[f"time of a batch{SIZE}{batch_size}"] = [
            Row.of(found, name, "batch_ms", UNPRUNED) for name in found.samples
        ]
    report(options, tables, results)


if __name__ == "__main__":
    main()
