"""First token, time per token and answer of our bundles against Hugging Face: `python -m benchmarks.speed.ttft`."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.graph_profile import open_profiled
from benchmarks.timing.harness import Pass, Results, Sample, Stopwatch, System, measure_once
from benchmarks.timing.hugging_face import DTYPES, PapersWay, StageClock, devices, load, place
from benchmarks.timing.peaks import in_words, measure_with_peaks
from benchmarks.timing.record import Row, report
from benchmarks.timing.stages import by_profile, stages, table, text
from benchmarks.timing.workspace import Workspace, add_length, add_options, engines
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from hivtp import Answer, Pipeline

HUGGING_FACE = "Hugging Face sdpa, unpruned"
PAPERS_WAY = "Hugging Face eager, the paper's way"
UNPRUNED = "fp32 / fp32, unpruned"
PRUNED = "fp32 / fp32, preset 192"
QUANTIZED_UNPRUNED = "int8 / int4, unpruned"
QUANTIZED = "int8 / int4, preset 192"
COARSE = "int8 / int4 in blocks of 128, preset 192"
PROMPTS = "int8 / int4 with prompts in w8a8, preset 192"
# By the precision of vision / language.
BUNDLES = {
    UNPRUNED: ExportSettings(is_pruned=False),
    PRUNED: ExportSettings(preset="192"),
    "fp16 / fp32, preset 192": ExportSettings(preset="192", vision_precision="fp16"),
    "int8 / int8, preset 192": ExportSettings(preset="192", vision_precision="int8", language_precision="int8"),
    QUANTIZED_UNPRUNED: ExportSettings(is_pruned=False, vision_precision="int8", language_precision="int4"),
    QUANTIZED: ExportSettings(preset="192", vision_precision="int8", language_precision="int4"),
    COARSE: ExportSettings(preset="192", vision_precision="int8", language_precision="int4", block_size=128),
    PROMPTS: ExportSettings(preset="192", vision_precision="int8", language_precision="int4", prefill_precision="w8a8"),
}
TTFT_GOALS = {PRUNED: 0.30, QUANTIZED: 0.17}
DECODE_GOALS = {QUANTIZED: 0.15}
# About 40 tokens with the chat template around it.
PROMPT = "What is in the picture on the left of the house, and how many people are there in the small red car above it?"
# Width and height.
PICTURE_SIZE = (640, 480)
TITLE = "answers"


def photos(size: tuple[int, int] = PICTURE_SIZE) -> Iterator[Image.Image]:
    """Pictures in memory, as a user's program holds them; a new one each time, since the pipeline knows old ones."""
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
    num_threads: int,
    checkpoint: Path,
    device: str,
    num_new_tokens: int,
    is_papers_way: bool = False,
    picture_size: tuple[int, int] = PICTURE_SIZE,
) -> Pass:
    """The checkpoint's own processor and `generate`, greedy; or `generate` on what is left the paper's way."""
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = load(checkpoint, num_threads, device, tower_attention="eager" if is_papers_way else "sdpa")
    clock = StageClock(device, model)
    way = PapersWay(model, clock)
    images = photos(picture_size)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]

    def run() -> Sample:
        image, tokens = next(images), TokenClock()
        with torch.inference_mode(), Stopwatch() as total:
            started = time.perf_counter()
            clock.start("preprocess_ms")
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=prompt, images=[image], return_tensors="pt").to(device, model.dtype)
            clock.stop("preprocess_ms")
            num_prompt_tokens = num_kept = inputs["input_ids"].shape[1]
            num_image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
            if is_papers_way:
                embeds = way.embed(inputs)
                num_kept = embeds.shape[1]
                inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], device=device)}
            model.generate(**inputs, max_new_tokens=num_new_tokens, do_sample=False, streamer=tokens)
        times, ttft_ms = clock.take(), (tokens.times[0] - started) * 1e3
        return {
            **times,
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


def load_settings(checkpoint: Path, device: str, engine: str) -> dict[str, Any]:
    """How a pipeline runs on a device; off the CPU, the language model runs in transformers."""
    if device == "cpu":
        return {"engine": engine}
    language = {"language": "transformers", "checkpoint": checkpoint, "language_device": device}
    return {"engine": engine, **language, "language_dtype": DTYPES[device]}


def open_bundle(num_threads: int, bundle: Path, settings: Mapping[str, Any], num_new_tokens: int) -> Pass:
    """The pipeline, greedy."""
    from hivtp import Pipeline

    return make_pass(Pipeline.load(bundle, num_threads=num_threads, **settings), num_new_tokens)


def make_pass(pipeline: Pipeline, num_new_tokens: int, picture_size: tuple[int, int] = PICTURE_SIZE) -> Pass:
    """One answer about a new picture."""
    images = photos(picture_size)

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
        "num_tiles": len(answer.kept_indices),
        "num_image_tokens": answer.num_image_tokens,
        "num_kept_tokens": answer.num_kept_tokens,
        "num_new_tokens": len(answer.token_ids),
    }


def bundle_systems(
    checkpoint: Path, bundles: Mapping[str, Path], device: str, open_system: Any, arguments: Mapping[str, Any]
) -> list[System]:
    """Every bundle in every engine of a device."""
    found = []
    for name, bundle in bundles.items():
        for engine in engines(bundle, device):
            label = name
            if device != "cpu":
                precision, _, budget = name.partition(", ")
                label = f"{precision.partition(' ')[0]} {engine} / {DTYPES[device]} transformers, {budget}"
            settings = load_settings(checkpoint, device, engine)
            found.append(System(label, open_system, {"bundle": bundle, "settings": settings, **arguments}))
    return found


def answer_floors(
    results: Results, precisions: Mapping[str, tuple[Path, str]], floors: Floors
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The floors of the first token, and of each one after it, of our systems.

    Args:
        results: with those of the unpruned Hugging Face model, which count the tokens of the text.
        precisions: by system its bundle, and the precision of its language model.
        floors: of the device.
    """
    ttft_ms, decode_ms = {}, {}
    num_text = int(results.values(HUGGING_FACE, "num_text_tokens")[0])
    for name, (bundle, precision) in precisions.items():
        num_tokens = num_text + int(results.values(name, "num_kept_tokens")[0])
        num_new_tokens = int(results.values(name, "num_new_tokens")[0])
        num_tiles = int(results.values(name, "num_tiles")[0])
        ttft_ms[name] = floors.ttft_ms(bundle, precision, num_tokens, num_tiles)
        decode_ms[name] = floors.decode_ms_per_token(precision, num_tokens, num_new_tokens)
    return ttft_ms, decode_ms


def language_precisions(systems: Sequence[System], bundles: Mapping[str, Path], device: str) -> dict[str, Any]:
    """By system of ours its bundle, and the precision in which its language model runs on a device."""
    names = {bundle: name for name, bundle in bundles.items()}
    found = {}
    for system in systems:
        if "bundle" in system.arguments:
            bundle = system.arguments["bundle"]
            # Off the CPU it runs in transformers; see load_settings.
            found[system.name] = (bundle, BUNDLES[names[bundle]].language_precision if device == "cpu" else "fp16")
    return found


def rows(results: Results, quantity: str, goals: Mapping[str, float], floors: Mapping[str, float | None]) -> list[Row]:
    """One quantity of every system by that of the unpruned Hugging Face model."""
    return [
        Row.of(results, name, quantity, HUGGING_FACE, goals.get(name), floors.get(name)) for name in results.samples
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "ttft.json")
    add_length(parser, 16)
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "answers")
    bundles = workspace.bundles(BUNDLES)
    length = {"num_new_tokens": options.new_tokens}
    tables, results = {}, {}
    for device in devices():
        model = {"checkpoint": workspace.checkpoint, "device": device, **length}
        systems = [
            System(HUGGING_FACE, open_hugging_face, model),
            System(PAPERS_WAY, open_hugging_face, {**model, "is_papers_way": True}),
            *bundle_systems(workspace.checkpoint, bundles, device, open_bundle, length),
        ]
        where = place(device)
        timed = measure_with_peaks(systems, options.rounds, options.threads, device)
        found, peaks, results[f"peaks{where}"] = timed
        results[TITLE + where] = found
        precisions = language_precisions(systems, bundles, device)
        ttft_floors, decode_floors = answer_floors(found, precisions, Floors(workspace.checkpoint, device, peaks))
        tables[f"time to first token{where}"] = rows(found, "ttft_ms", TTFT_GOALS, ttft_floors)
        tables[f"decode per token{where}"] = rows(found, "decode_ms_per_token", DECODE_GOALS, decode_floors)
        tables[f"whole answer{where}, {options.new_tokens} tokens"] = rows(found, "answer_ms", {}, {})
    print(by_profile(TITLE))
    profiled = [System(name, open_profiled, {"bundle": bundle, "num_tiles": 1}) for name, bundle in bundles.items()]
    profiles = results[by_profile(TITLE)] = measure_once(profiled, options.threads)
    report(options, tables, results)
    answers = results[TITLE]
    [first, *_] = answers.samples[HUGGING_FACE]
    print("\n" + "\n".join(in_words(found) for title, found in results.items() if title.startswith("peaks")))
    lengths = {name: int(answers.values(name, "num_new_tokens")[0]) for name in answers.samples}
    print(f"\n{text(table(stages(answers.samples, profiles.samples)))}")
    print(f"\nprompt: {first['num_image_tokens']:.0f} image and {first['num_text_tokens']:.0f} text tokens")
    print(f"new tokens: {lengths}")


if __name__ == "__main__":
    main()
