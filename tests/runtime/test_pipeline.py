from __future__ import annotations

import gc
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from hivtp import Answer, AnswerStream, Pipeline, Timings
from hivtp.engines import Engine, EngineSettings
from hivtp.runtime.vision.cache import EmbeddingCache
from hivtp.runtime.vision.encoder import open_image_encoder
from hivtp.runtime.vision.stage import VisionStage
from hivtp_ops.errors import ImageError, OutOfMemoryError, PromptError, ScoreError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping


PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")
PROMPTS = ("What is in the picture?", "how many dogs", "Ünïcödé 猫 🐈?")
NUM_TOKENS = 40


def test_an_image_gives_the_same_answer_in_every_form(pruned, photo):
    image = Image.open(photo).convert("RGB")
    png = io.BytesIO()
    image.save(png, "PNG")
    forms = [photo, str(photo), photo.read_bytes(), bytearray(png.getvalue()), image, np.asarray(image)]
    answers = [pruned.generate(PROMPTS[0], [form], max_new_tokens=12) for form in forms]
    assert all(answer.token_ids == answers[0].token_ids for answer in answers)
    assert all(answer.kept_indices == answers[0].kept_indices for answer in answers)
    assert pruned.generate(PROMPTS[0], (photo,), max_new_tokens=12).token_ids == answers[0].token_ids


def test_pieces_of_a_stream_join_to_the_answer_that_generate_gives(pipelines, photos):
    for pipeline in pipelines.values():
        for name in PHOTOS:
            stream = pipeline.stream(PROMPTS[0], [photos / name], max_new_tokens=NUM_TOKENS)
            pieces = list(stream)
            answer = pipeline.generate(PROMPTS[0], [photos / name], max_new_tokens=NUM_TOKENS)
            assert len(pieces) > 5
            assert all(pieces)
            assert "".join(pieces) == stream.answer.text == answer.text
            assert answer.text == pipeline.tokenizer.decode(answer.token_ids)
            assert stream.answer.token_ids == answer.token_ids
            assert stream.answer.kept_indices == [image.tiles[0].kept_indices.tolist() for image in stream.images]


def test_a_stream_runs_the_model_only_as_it_is_asked(pruned, photo):
    stream = pruned.stream(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS)
    assert isinstance(stream, AnswerStream)
    assert stream.images == []
    with pytest.raises(RuntimeError, match="complete when the stream is exhausted"):
        _ = stream.answer
    next(stream)
    assert len(stream.images) == 1
    with pytest.raises(RuntimeError, match="complete when the stream is exhausted"):
        _ = stream.answer
    assert list(stream)
    assert list(stream) == []
    assert stream.answer.finish_reason == "length"


def test_abandoned_streams_do_no_harm(pruned, photo):
    expected = pruned.generate(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS).token_ids
    unfinished = [pruned.stream(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS) for _ in range(8)]
    for stream in unfinished[:6]:
        next(stream)
    del unfinished[:4], stream
    gc.collect()
    assert pruned.generate(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS).token_ids == expected
    for stream in unfinished:
        list(stream)
        assert stream.answer.token_ids == expected


def test_a_closed_stream_gives_its_memory_back_at_once(pruned, photo, monkeypatch):
    pipeline, closed = Pipeline.load(pruned.bundle.folder, num_threads=1), []
    generate = pipeline.language.generate

    def watched(*arguments):
        try:
            yield from generate(*arguments)
        finally:
            closed.append(True)

    monkeypatch.setattr(pipeline.language, "generate", watched)
    stream = pipeline.stream(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS)
    next(stream)
    assert closed == []
    stream.close()
    assert closed == [True]
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="complete when the stream is exhausted"):
        _ = stream.answer
    finished = pipeline.stream(PROMPTS[0], [photo], max_new_tokens=3)
    text = "".join(finished)
    finished.close()
    assert finished.answer.text == text


def test_running_out_of_memory_is_an_error_that_says_what_to_do(pruned, photo, monkeypatch):
    pipeline = Pipeline.load(pruned.bundle.folder, num_threads=1)

    def no_room(*_arguments):
        raise MemoryError("for 9 GiB")

    lazy, grey = Image.open(photo), Image.new("L", (64, 64))
    for owner, name, image in (
        (Image.Image, "load", lazy),
        (Image.Image, "convert", grey),
        (pipeline.images._encoder._vision.engine, "run", grey),
        (pipeline.language, "embed", grey),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, no_room)
            with pytest.raises(OutOfMemoryError, match=r"\(for 9 GiB\); give fewer"):
                pipeline.generate(PROMPTS[0], [image])
    assert pipeline.generate(PROMPTS[0], [photo], max_new_tokens=2).token_ids


def test_threads_give_the_answers_of_one_after_the_other(pipelines, photos):
    requests = [(name, prompt) for name in PHOTOS for prompt in PROMPTS]
    for pipeline in (pipelines["unpruned"], pipelines["varying"]):

        def ask(request: tuple[str, str], pipeline: Pipeline = pipeline) -> list[int]:
            name, prompt = request
            return pipeline.generate(prompt, [photos / name], max_new_tokens=NUM_TOKENS).token_ids

        one_by_one = [ask(request) for request in requests]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(ask, requests)) == one_by_one


def test_sampling_repeats_with_its_seed(pruned, photo):
    def sample(**settings: float | None) -> list[int]:
        return pruned.generate(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS, **settings).token_ids

    first = sample(temperature=1.0, seed=7)
    assert sample(temperature=1.0, seed=7) == first
    assert sample(temperature=1.0, seed=8) != first
    assert sample(temperature=1.0) != sample(temperature=1.0)
    assert sample(temperature=1.0, top_p=0.5, seed=7) == sample(temperature=1.0, top_p=0.5, seed=7)


def test_drawing_from_the_best_token_alone_is_greedy(pruned, photo):
    greedy = pruned.generate(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}):
        drawn = pruned.generate(PROMPTS[0], [photo], max_new_tokens=NUM_TOKENS, temperature=1.0, **settings)
        assert drawn.token_ids == greedy.token_ids


def test_an_end_of_sequence_token_in_the_last_place_is_a_stop(unpruned, photo):
    answer = unpruned.generate(PROMPTS[0], [photo], max_new_tokens=1)
    assert answer.finish_reason == "length"
    manifest = unpruned.bundle.manifest.language
    ending = Pipeline.load(unpruned.bundle.folder)
    ending.language.manifest = type(manifest)(**(vars(manifest) | {"eos_token_ids": tuple(answer.token_ids)}))
    assert ending.generate(PROMPTS[0], [photo], max_new_tokens=1).finish_reason == "stop"


def test_the_longest_prompt_leaves_room_for_one_token(unpruned, prompt_of):
    answer = unpruned.generate(prompt_of(511), max_new_tokens=9)
    assert len(answer.token_ids) == 1
    with pytest.raises(PromptError, match=r"takes 512 tokens, images included; the context of this model holds 512"):
        unpruned.stream(prompt_of(512))


def test_a_prompt_that_the_images_make_too_long_is_refused(pipelines, photo):
    for pipeline, num_images in ((pipelines["unpruned"], 8), (pipelines["varying"], 9), (pipelines["exact"], 25)):
        stream = pipeline.stream("what " + "<image>" * num_images, [photo] * num_images)
        with pytest.raises(PromptError, match="shorten the prompt or give fewer images"):
            next(stream)


def test_pruning_makes_room_for_more_images(pipelines, photo):
    answer = pipelines["exact"].generate("what " + "<image>" * 20, [photo] * 20, max_new_tokens=3)
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (20 * 64, 20 * 21)


class WithoutScores:
    """An engine whose scores overflowed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.output_names = engine.output_names
        self.max_tiles = engine.max_tiles

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine.run(inputs)
        outputs["importance"] = np.full_like(outputs["importance"], np.nan)
        return outputs


def test_nan_in_the_scores_is_an_error_and_the_pipeline_stays_usable(pruned, photo):
    broken = Pipeline.load(pruned.bundle.folder)
    engine = VisionStage.open(pruned.bundle, EngineSettings()).engine
    stage = VisionStage(WithoutScores(engine), pruned.bundle.manifest.vision)
    broken.images = open_image_encoder(pruned.bundle, stage, EmbeddingCache())
    with pytest.raises(ScoreError, match="hold NaN"):
        broken.generate(PROMPTS[0], [photo])
    text_only = broken.generate(PROMPTS[0], max_new_tokens=5)
    assert text_only.token_ids == pruned.generate(PROMPTS[0], max_new_tokens=5).token_ids


def test_timings_are_positive_and_the_first_token_s_is_the_sum(pruned, photo):
    timings = pruned.generate(PROMPTS[0], [photo], max_new_tokens=20).timings
    assert all(getattr(timings, field.name) > 0 for field in fields(Timings))
    assert timings.ttft_ms == timings.preprocess_ms + timings.vision_ms + timings.prefill_ms
    assert pruned.generate(PROMPTS[0], [photo], max_new_tokens=1).timings.decode_ms_per_token is None


def test_an_answer_is_plain_values_with_the_documented_names(pruned, photo):
    answer = pruned.generate(PROMPTS[0], [photo], max_new_tokens=5)
    names = {"text", "token_ids", "num_image_tokens", "num_kept_tokens", "kept_indices", "finish_reason", "timings"}
    assert {field.name for field in fields(Answer)} == names
    assert json.loads(json.dumps(answer.to_dict())) == answer.to_dict()
    assert set(answer.to_dict()["timings"]) == {
        "preprocess_ms",
        "vision_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
    }


@pytest.mark.parametrize("max_new_tokens", [0, -1, 1.5, "5", True, None])
def test_a_number_of_new_tokens_that_cannot_be_is_refused(pruned, max_new_tokens):
    with pytest.raises(SettingsError, match="max_new_tokens must be a whole number, 1 or more"):
        pruned.generate("what", max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"seed": -1}])
def test_sampling_settings_out_of_range_are_refused(pruned, settings):
    with pytest.raises(SettingsError):
        pruned.generate("what", **settings)


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("", 0, "the prompt is empty"),
        (" \n", 1, "the prompt is empty"),
        ("what <image>", 0, "has 1 <image> marks and 0 images were given"),
        ("what", 2, "has 0 <image> marks and 2 images were given"),
        ("<image> or <image>", 1, "has 2 <image> marks and 1 images were given"),
    ],
)
def test_prompts_that_do_not_fit_the_images_are_refused_before_the_model_runs(
    pruned, photo, prompt, num_images, message
):
    with pytest.raises(PromptError, match=message):
        pruned.stream(prompt, [photo] * num_images)


@pytest.mark.parametrize("images", ["photo.jpg", b"bytes", Path("photo.jpg"), np.zeros((8, 8, 3), np.uint8), None])
def test_images_that_are_no_list_are_refused_with_what_to_write(pruned, images):
    with pytest.raises(PromptError, match=r"must be a list of images.*write images=\[image\]"):
        pruned.stream("what", images)


def test_an_image_that_is_none_is_refused_before_the_model_runs(pruned, photo, tmp_path):
    with pytest.raises(ImageError, match="there is no image file"):
        pruned.stream("what <image><image>", [photo, tmp_path / "absent.png"])
