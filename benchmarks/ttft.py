"""Time to first token and decode per token of our bundles against Hugging Face: `python -m benchmarks.ttft`."""

from __future__ import annotations

import argparse
import itertools
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Pass, Results, Row, Sample, Stopwatch, System, measure, report
from benchmarks.workspace import Workspace, add_options
from hivtp.export.exporter import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from hivtp import Answer

HUGGING_FACE = "Hugging Face sdpa fp32, unpruned"
UNPRUNED = "fp32 / fp32, unpruned"
PRUNED = "fp32 / fp32, preset 192"
QUANTIZED = "int8 / int4, preset 192"
BUNDLES = {
    UNPRUNED: ExportSettings(is_pruned=False),
    PRUNED: ExportSettings(preset="192"),
    QUANTIZED: ExportSettings(preset="192", vision_precision="int8", language_precision="int4"),
}
TTFT_GOALS = {PRUNED: 0.30, QUANTIZED: 0.17}
DECODE_GOALS = {QUANTIZED: 0.15}
# About 40 tokens with the chat template around it.
PROMPT = "What is in the picture on the left of the house, and how many people are there in the small red car above it?"


def photos() -> Iterator[Image.Image]:
    """Pictures in memory, as a user's program holds them; a new one each time, since the pipeline knows old ones."""
    from PIL import Image

    for seed in itertools.count():
        blobs = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        yield Image.fromarray(blobs).resize((640, 480))


class TokenClock:
    """A streamer of transformers that notes when each token came; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, _tokens: Any) -> None:
        """Note a token."""
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


def open_hugging_face(num_threads: int, checkpoint: Path, num_new_tokens: int) -> Pass:
    """The checkpoint's own processor and `generate`, greedy."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(num_threads)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    images = photos()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]

    def run() -> Sample:
        image, clock = next(images), TokenClock()
        with torch.inference_mode(), Stopwatch() as total:
            started = time.perf_counter()
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=text, images=[image], return_tensors="pt")
            preprocessed = time.perf_counter()
            model.generate(**inputs, max_new_tokens=num_new_tokens, do_sample=False, streamer=clock)
        num_steps = len(clock.times) - 1
        return {
            "preprocess_ms": (preprocessed - started) * 1e3,
            "ttft_ms": (clock.times[0] - started) * 1e3,
            "decode_ms_per_token": (clock.times[-1] - clock.times[0]) * 1e3 / num_steps,
            "answer_ms": total.ms,
            "num_prompt_tokens": inputs["input_ids"].shape[1],
            "num_new_tokens": len(clock.times),
        }

    return run


def open_bundle(num_threads: int, bundle: Path, num_new_tokens: int) -> Pass:
    """The pipeline, greedy."""
    from hivtp import Pipeline

    pipeline = Pipeline.load(bundle, num_threads=num_threads)
    images = photos()

    def run() -> Sample:
        image = next(images)
        with Stopwatch() as total:
            answer = pipeline.generate(PROMPT, [image], max_new_tokens=num_new_tokens)
        return sample_of(answer, total.ms)

    return run


def sample_of(answer: Answer, answer_ms: float) -> Sample:
    """What an answer says of its own times and tokens."""
    timings = answer.timings
    assert timings.decode_ms_per_token is not None, "the answer ended after its first token"
    return {
        "preprocess_ms": timings.preprocess_ms,
        "vision_ms": timings.vision_ms,
        "prefill_ms": timings.prefill_ms,
        "ttft_ms": timings.ttft_ms,
        "decode_ms_per_token": timings.decode_ms_per_token,
        "answer_ms": answer_ms,
        "num_image_tokens": answer.num_image_tokens,
        "num_kept_tokens": answer.num_kept_tokens,
        "num_new_tokens": len(answer.token_ids),
    }


def rows(results: Results, quantity: str, goals: Mapping[str, float]) -> list[Row]:
    """One quantity of every system by that of the unpruned Hugging Face model."""
    baseline = results.values(HUGGING_FACE, quantity)
    return [Row(name, results.values(name, quantity), baseline, goals.get(name)) for name in results.samples]


def split(results: Results, names: Iterable[str]) -> str:
    """Where the time to first token goes in these bundles: medians."""
    lines = [f"{'median ms':<24} {'image tokens':>12} {'preprocess':>11} {'vision':>9} {'prefill':>9}"]
    for name in names:
        kept, *times = (
            median(results.values(name, quantity))
            for quantity in ("num_kept_tokens", "preprocess_ms", "vision_ms", "prefill_ms")
        )
        lines.append(f"{name:<24} {kept:12.0f} {times[0]:11.1f} {times[1]:9.1f} {times[2]:9.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "ttft.json")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answer (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more, to time the decoding")
    workspace = Workspace.open(options, "ttft")
    length = {"num_new_tokens": options.new_tokens}
    systems = [System(HUGGING_FACE, open_hugging_face, {"checkpoint": workspace.checkpoint, **length})]
    systems += [
        System(name, open_bundle, {"bundle": workspace.bundle(name, settings), **length})
        for name, settings in BUNDLES.items()
    ]
    results = measure(systems, options.rounds, options.threads)
    num_image_tokens = results.values(UNPRUNED, "num_image_tokens")[0]
    num_text_tokens = results.values(HUGGING_FACE, "num_prompt_tokens")[0] - num_image_tokens
    tables = {
        "time to first token": rows(results, "ttft_ms", TTFT_GOALS),
        "decode per token": rows(results, "decode_ms_per_token", DECODE_GOALS),
        "whole answer": rows(results, "answer_ms", {}),
    }
    report(options, tables, {"answers": results})
    lengths = {name: int(results.values(name, "num_new_tokens")[0]) for name in results.samples}
    print(f"\n{split(results, BUNDLES)}")
    print(f"\nprompt: {num_image_tokens:.0f} image and {num_text_tokens:.0f} text tokens; new tokens: {lengths}")


if __name__ == "__main__":
    main()
