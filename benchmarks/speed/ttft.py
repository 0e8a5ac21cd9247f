"""First token, time per token and answer of our bundles against Hugging Face: `python -m benchmarks.speed.ttft`."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.graph_profile import open_profiled
from benchmarks.timing.harness import Results, Stopwatch, measure_once
from benchmarks.timing.hugging_face import PAPERS_WAY, UNPRUNED, PapersWay, StageClock, chat_prompt, load
from benchmarks.timing.peaks import in_words, measure_with_peaks
from benchmarks.timing.record import Row, report
from benchmarks.timing.stages import by_profile
from benchmarks.timing.worker import System
from benchmarks.timing.workspace import Workspace, add_length, add_options
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from benchmarks.timing.worker import Pass, Sample
    from hivtp import Answer, Pipeline

FLOAT_UNPRUNED = "fp32 / fp32, unpruned"
FLOAT = "fp32 / fp32, preset 192"
QUANTIZED_UNPRUNED = "int8 / int4, unpruned"
QUANTIZED = "int8 / int4, preset 192"
COARSE = "int8 / int4 in blocks of 128, preset 192"
PREFILL = "int8 / int4, prefill in w8a8, preset 192"
_INT8_INT4 = ExportSettings(preset="192", vision_precision="int8", language_precision="int4")
# By the precision of vision / language.
BUNDLES = {
    FLOAT_UNPRUNED: ExportSettings(is_pruned=False),
    FLOAT: ExportSettings(preset="192"),
    "fp16 / fp32, preset 192": ExportSettings(preset="192", vision_precision="fp16"),
    "int8 / int8, preset 192": replace(_INT8_INT4, language_precision="int8"),
    QUANTIZED_UNPRUNED: ExportSettings(is_pruned=False, vision_precision="int8", language_precision="int4"),
    QUANTIZED: _INT8_INT4,
    COARSE: replace(_INT8_INT4, block_size=128),
    PREFILL: replace(_INT8_INT4, prefill_precision="w8a8"),
}
TTFT_GOALS = {FLOAT: 0.30, QUANTIZED: 0.17}
DECODE_GOALS = {QUANTIZED: 0.15}
# About 40 tokens with the chat template around it.
PROMPT = "What is in the picture on the left of the house, and how many people are there in the small red car above it?"
# Width and height.
IMAGE_SIZE = (640, 480)
TITLE = "answers"


def drawn_images(size: tuple[int, int] = IMAGE_SIZE) -> Iterator[Image.Image]:
    """Images in memory, as a user's program holds them; a new one each time, since the pipeline knows old ones."""
    from PIL import Image

    for seed in itertools.count():
        blobs = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        yield Image.fromarray(blobs).resize(size)


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


def open_hugging_face(
    num_threads: int, checkpoint: Path, num_new_tokens: int, is_papers_way: bool = False, **loading: Any
) -> Pass:
    """The checkpoint's own processor and `generate`, greedy; or `generate` on what is left the paper's way.

    Args:
        num_threads: of torch.
        checkpoint: its folder.
        num_new_tokens: of an answer.
        is_papers_way: see `hugging_face.PapersWay`.
        **loading: see `hugging_face.load`.
    """
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    if is_papers_way:
        loading["tower_attention"] = "eager"
    model = load(checkpoint, num_threads, **loading)
    clock = StageClock(model)
    way = PapersWay(model, clock)
    images = drawn_images()

    def run() -> Sample:
        image, tokens = next(images), TokenClock()
        with torch.inference_mode(), Stopwatch() as total:
            started = time.perf_counter()
            clock.start("preprocess_ms")
            prompt = chat_prompt(processor, PROMPT)
            inputs = processor(text=prompt, images=[image], return_tensors="pt").to(model.device, model.dtype)
            clock.stop("preprocess_ms")
            num_prompt_tokens = num_kept = inputs["input_ids"].shape[1]
            num_image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
            if is_papers_way:
                embeds = way.embed(inputs)
                num_kept = embeds.shape[1]
                inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], device=model.device)}
            model.generate(**inputs, max_new_tokens=num_new_tokens, do_sample=False, streamer=tokens)
        times, ttft_ms = clock.take(), (tokens.times[0] - started) * 1e3
        return {
            **times,
            "vision_ms": sum(times.values()) - times["preprocess_ms"],
            "prefill_ms": ttft_ms - sum(times.values()),
            "ttft_ms": ttft_ms,
            "decode_ms_per_token": (tokens.times[-1] - tokens.times[0]) * 1e3 / (len(tokens.times) - 1),
            "answer_ms": total.ms,
            "num_text_tokens": num_prompt_tokens - num_image_tokens,
            "num_image_tokens": num_image_tokens,
            "num_kept_tokens": num_image_tokens - (num_prompt_tokens - num_kept),
            "num_new_tokens": len(tokens.times),
        }

    return run


def open_bundle(num_threads: int, bundle: Path, num_new_tokens: int) -> Pass:
    """The pipeline, greedy."""
    from benchmarks.pipelines import load_pipeline

    return make_pass(load_pipeline(bundle, num_threads), num_new_tokens)


def make_pass(pipeline: Pipeline, num_new_tokens: int, image_size: tuple[int, int] = IMAGE_SIZE) -> Pass:
    """One answer about a new image."""
    from hivtp import SamplingParams

    images, sampling = drawn_images(image_size), SamplingParams(max_new_tokens=num_new_tokens)

    def run() -> Sample:
        image = next(images)
        with Stopwatch() as total:
            answer = pipeline.generate(PROMPT, [image], sampling)
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
        "num_tiles": len(answer.kept_indices),
        "num_image_tokens": answer.num_image_tokens,
        "num_kept_tokens": answer.num_kept_tokens,
        "num_new_tokens": len(answer.token_ids),
    }


def answer_floors(
    results: Results, bundles: Mapping[str, Path], floors: Floors
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The floors of the first token, and of each one after it, of our systems.

    Args:
        results: with those of the unpruned Hugging Face model, which count the tokens of the text.
        bundles: of our systems.
        floors: of this machine.
    """
    ttft_ms, decode_ms = {}, {}
    num_text = results.first(UNPRUNED, "num_text_tokens")
    for name, folder in bundles.items():
        num_tokens = num_text + results.first(name, "num_kept_tokens")
        ttft_ms[name] = floors.ttft_ms(folder, num_tokens, results.first(name, "num_tiles"))
        decode_ms[name] = floors.decode_ms_per_token(folder, num_tokens, results.first(name, "num_new_tokens"))
    return ttft_ms, decode_ms


def rows(results: Results, quantity: str, goals: Mapping[str, float], floors: Mapping[str, float | None]) -> list[Row]:
    """One quantity of every system by that of the unpruned Hugging Face model."""
    return [Row.of(results, name, quantity, UNPRUNED, goals.get(name), floors.get(name)) for name in results.samples]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "ttft.json")
    add_length(parser, 16)
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "answers")
    bundles = workspace.bundles(BUNDLES)
    length = {"num_new_tokens": options.new_tokens}
    model = {"checkpoint": workspace.checkpoint, **length}
    systems = [
        System(UNPRUNED, open_hugging_face, model),
        System(PAPERS_WAY, open_hugging_face, {**model, "is_papers_way": True}),
        *(System(name, open_bundle, {"bundle": bundle, **length}) for name, bundle in bundles.items()),
    ]
    found, peaks, of_peaks = measure_with_peaks(systems, options.rounds, options.threads)
    ttft_floors, decode_floors = answer_floors(found, bundles, Floors(workspace.checkpoint, peaks))
    tables = {
        "time to first token": rows(found, "ttft_ms", TTFT_GOALS, ttft_floors),
        "decode per token": rows(found, "decode_ms_per_token", DECODE_GOALS, decode_floors),
        f"whole answer, {options.new_tokens} tokens": rows(found, "answer_ms", {}, {}),
    }
    print(by_profile(TITLE))
    profiled = [System(name, open_profiled, {"bundle": bundle, "num_tiles": 1}) for name, bundle in bundles.items()]
    profiles = measure_once(profiled, options.threads)
    report(options, tables, {"peaks": of_peaks, TITLE: found, by_profile(TITLE): profiles})
    lengths = {name: found.first(name, "num_new_tokens") for name in found.samples}
    num_image, num_text = (found.first(UNPRUNED, f"num_{part}_tokens") for part in ("image", "text"))
    print(f"\n{in_words(of_peaks)}\nprompt: {num_image} image and {num_text} text tokens\nnew tokens: {lengths}")


if __name__ == "__main__":
    main()
