from __future__ import annotations

import gc
import io
import json
import tracemalloc
import weakref
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from hivtp import Answer, AnswerStream, HivtpError, ImagePart, Message, Request, Timings
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.language.kv_cache import KvCache
from hivtp.runtime.likelihood import Continuation, likelihoods
from hivtp_ops.errors import (
    EngineError,
    ImageError,
    OutOfMemoryError,
    PromptError,
    RequestError,
    ScoreError,
    SettingsError,
)
from tests.support.answers import PHOTOS, ask, at_most, load, same

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "What is in the picture?"
NUM_TOKENS = 40


def test_an_image_gives_the_same_answer_in_every_form(pruned, photo):
    image = Image.open(photo).convert("RGB")
    png = io.BytesIO()
    image.save(png, "PNG")
    forms = [photo, str(photo), photo.read_bytes(), bytearray(png.getvalue()), image, np.asarray(image)]
    answers = [pruned.generate(PROMPT, [form], at_most(12)) for form in forms]
    answers.append(pruned.generate(PROMPT, (photo,), at_most(12)))
    answers.append(pruned.generate(ask(PROMPT, [photo], 12)))
    answers.append(pruned.generate(ask(Message("user", [ImagePart(photo), PROMPT]), (), 12)))
    assert all(same(answer, answers[0]) for answer in answers)


def test_pieces_of_a_stream_join_to_the_answer_that_generate_gives(pipelines, photos):
    for pipeline in pipelines.values():
        for name in PHOTOS:
            stream = pipeline.stream(PROMPT, [photos / name], at_most(NUM_TOKENS))
            pieces = list(stream)
            answer = pipeline.generate(PROMPT, [photos / name], at_most(NUM_TOKENS))
            assert len(pieces) > 5
            assert all(pieces)
            assert "".join(pieces) == stream.answer.text == answer.text
            assert answer.text == pipeline.model.tokenizer.decode(answer.token_ids)
            assert same(stream.answer, answer)
            assert answer.kept_indices == [image.tiles[0].kept_indices.tolist() for image in stream.images]


def test_a_stream_runs_the_model_only_as_it_is_asked(pruned, photo):
    stream = pruned.stream(PROMPT, [photo], at_most(NUM_TOKENS))
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
    expected = pruned.generate(PROMPT, [photo], at_most(NUM_TOKENS)).token_ids
    unfinished = [pruned.stream(PROMPT, [photo], at_most(NUM_TOKENS)) for _ in range(8)]
    for stream in unfinished[:6]:
        next(stream)
    del unfinished[:4], stream
    assert pruned.generate(PROMPT, [photo], at_most(NUM_TOKENS)).token_ids == expected
    for stream in unfinished:
        list(stream)
        assert stream.answer.token_ids == expected


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KvCache]]:
    """Every KV cache that was made."""
    made: list[weakref.ref[KvCache]] = []

    class Noted(KvCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr("hivtp.runtime.language.onnxruntime.KvCache", Noted)
    return made


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped"])
def test_a_stream_that_is_over_gives_its_memory_back_at_once(pruned, photo, caches, end):
    # By reference counts alone, since a garbage collector may come late.
    gc.disable()
    try:
        stream = pruned.stream(PROMPT, [photo], at_most(NUM_TOKENS))
        next(stream)
        assert [cache() is None for cache in caches] == [False]
        if end == "exhausted":
            list(stream)
        elif end == "closed":
            stream.close()
        else:
            del stream
        assert [cache() is None for cache in caches] == [True]
    finally:
        gc.enable()


def test_a_closed_stream_has_no_answer(pruned, photo):
    stream = pruned.stream(PROMPT, [photo], at_most(NUM_TOKENS))
    next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="complete when the stream is exhausted"):
        _ = stream.answer


def test_pixels_and_embeddings_are_held_no_longer_than_they_are_needed(pruned_bundle, photo, monkeypatch):
    """Once they have gone through the vision stage, and into the KV cache."""
    pipeline = load(pruned_bundle, cache_bytes=0)
    model = pipeline.model
    held: list[weakref.ref[Any]] = []
    prepare, embed = model.images.prepare, model.embed

    def noted_prepare(image: Any, num_images: int) -> Any:
        prepared = prepare(image, num_images)
        held.append(weakref.ref(prepared.pixel_values))
        return prepared

    def noted_embed(prompt: Any) -> Any:
        embeds = embed(prompt)
        held.append(weakref.ref(embeds))
        return embeds

    monkeypatch.setattr(model.images, "prepare", noted_prepare)
    monkeypatch.setattr(model, "embed", noted_embed)
    stream = pipeline.stream(PROMPT, [photo], at_most(NUM_TOKENS))
    assert [reference() is None for reference in held] == [False]
    next(stream)
    assert [reference() is None for reference in held] == [True, True]


def test_an_exhausted_stream_that_is_closed_keeps_its_answer(pruned, photo):
    stream = pruned.stream(PROMPT, [photo], at_most(3))
    text = "".join(stream)
    stream.close()
    assert stream.answer.text == text


def test_a_closed_pipeline_gives_its_memory_back_and_says_that_it_is_closed(pruned_bundle, photo, caches):
    with load(pruned_bundle) as pipeline:
        chat, stream = pipeline.chat(), pipeline.stream(PROMPT, [photo], at_most(NUM_TOKENS))
        unbegun = pipeline.stream(PROMPT, (), at_most(2))
        chat.ask(PROMPT, [photo], at_most(2))
        next(stream)
        decoder = weakref.ref(pipeline.model.language._loaded.decode)
        engine = weakref.ref(pipeline.model.images._encoder._vision.engine)
    pipeline.close()
    assert len(pipeline.model.images.cache) == 0
    assert engine() is None
    uses: list[tuple[Callable[..., object], Any]] = [
        (pipeline.generate, PROMPT),
        (pipeline.stream, PROMPT),
        (list, stream),
        (list, unbegun),
        (chat.ask, "how many"),
        (pipeline.chat().ask, "how many"),
    ]
    for use, argument in uses:
        with pytest.raises(EngineError, match=r"^this pipeline is closed; load the bundle again$"):
            use(argument)
    results = pipeline.generate_batch([ask(PROMPT), ask(PROMPT, [photo])])
    results += list(pipeline.generate_each([ask(PROMPT)]))
    results += likelihoods(pipeline.model, [Continuation(PROMPT, [photo], " a dog")])
    assert [str(result) for result in results] == ["this pipeline is closed; load the bundle again"] * 4
    del chat, stream, unbegun, uses, use, argument
    gc.collect()
    assert decoder() is None
    assert all(cache() is None for cache in caches)


def test_running_out_of_memory_is_an_error_that_says_what_to_do(pruned_bundle, photo, monkeypatch):
    pipeline = load(pruned_bundle)

    def no_room(*_arguments: Any) -> Any:
        raise MemoryError("for 9 GiB")

    lazy, grey = Image.open(photo), Image.new("L", (64, 64))
    model = pipeline.model
    for owner, name, image in (
        (Image.Image, "load", lazy),
        (Image.Image, "convert", grey),
        (PromptTemplate, "encode", grey),
        (model.images._encoder._vision.engine.session, "run", grey),
        (model.language, "embed", grey),
        (model.language, "open_slots", grey),
        (model.language._loaded.decode, "run_with_iobinding", grey),
        (KvCache, "_allocate", grey),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, no_room)
            with pytest.raises(OutOfMemoryError, match=r"\(for 9 GiB\); give fewer"):
                pipeline.generate(PROMPT, [image])
            [result] = pipeline.generate_batch([Request(PROMPT, [image])])
            assert isinstance(result, OutOfMemoryError)
    assert pipeline.generate(PROMPT, [photo], at_most(2)).token_ids


def test_whatever_a_library_raises_is_one_of_our_errors(pruned_bundle, photo, monkeypatch):
    pipeline = load(pruned_bundle)
    model = pipeline.model
    for owner, name in (
        (PromptTemplate, "render"),
        (model.tokenizer, "stream"),
        (model.images, "prepare"),
        (model.images._encoder, "encode"),
        (model.language, "embed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_arguments: {}["absent"])
            with pytest.raises(RequestError, match=r"the request failed: KeyError: 'absent'; please report this"):
                pipeline.generate(PROMPT, [Image.open(photo).resize((50, 50))])


def test_sampling_repeats_with_its_seed(pruned, photo):
    def sample(**settings: Any) -> list[int]:
        return pruned.generate(PROMPT, [photo], at_most(NUM_TOKENS, **settings)).token_ids

    first = sample(temperature=1.0, seed=7)
    assert sample(temperature=1.0, seed=7) == first
    assert sample(temperature=1.0, seed=8) != first
    assert sample(temperature=1.0) != sample(temperature=1.0)
    assert sample(temperature=1.0, top_p=0.5, seed=7) == sample(temperature=1.0, top_p=0.5, seed=7)
    # Drawing from the best token alone is greedy.
    assert sample() == sample(temperature=1.0, top_k=1) == sample(temperature=1.0, top_p=1e-9)


def test_the_longest_prompt_leaves_room_for_one_token(unpruned, prompt_of):
    answer = unpruned.generate(prompt_of(511), (), at_most(9))
    assert len(answer.token_ids) == 1
    assert answer.num_prompt_tokens == 511
    with pytest.raises(PromptError, match=r"takes 512 tokens, images and earlier turns .* of this model holds 512"):
        unpruned.stream(prompt_of(512))


def test_a_prompt_that_the_images_make_too_long_is_refused(pipelines, photo):
    for pipeline, num_images in ((pipelines["unpruned"], 8), (pipelines["varying"], 9), (pipelines["exact"], 25)):
        stream = pipeline.stream("what " + "<image>" * num_images, [photo] * num_images)
        with pytest.raises(PromptError, match="shorten the prompt, give fewer images"):
            next(stream)


def test_pruning_makes_room_for_more_images(pipelines, photo):
    answer = pipelines["exact"].generate("what " + "<image>" * 20, [photo] * 20, at_most(3))
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (20 * 64, 20 * 21)


def test_nan_in_the_scores_is_an_error_and_the_pipeline_stays_usable(pruned_bundle, pruned, photo, monkeypatch):
    broken = load(pruned_bundle)
    engine = broken.model.images._encoder._vision.engine
    run = engine.run

    def without_scores(inputs: Any) -> dict[str, np.ndarray]:
        outputs = run(inputs)
        return outputs | {"importance": np.full_like(outputs["importance"], np.nan)}

    monkeypatch.setattr(engine, "run", without_scores)
    with pytest.raises(ScoreError, match="hold NaN"):
        broken.generate(PROMPT, [photo])
    assert same(broken.generate(PROMPT, (), at_most(5)), pruned.generate(PROMPT, (), at_most(5)))


def test_timings_are_positive_and_the_first_token_s_is_the_sum(pruned, photo):
    timings = pruned.generate(PROMPT, [photo], at_most(20)).timings
    assert all(getattr(timings, field.name) > 0 for field in fields(Timings))
    assert timings.ttft_ms == timings.preprocess_ms + timings.vision_ms + timings.prefill_ms
    assert pruned.generate(PROMPT, [photo], at_most(1)).timings.decode_ms_per_token is None


def test_an_answer_is_plain_values_with_the_documented_names(pruned, photo):
    answer = pruned.generate(PROMPT, [photo], at_most(5, logprobs=2))
    names = "text token_ids num_prompt_tokens num_image_tokens num_kept_tokens kept_indices finish_reason stop logprobs"
    assert {field.name for field in fields(Answer)} == {*names.split(), "timings", "ran"}
    plain = json.loads(json.dumps(answer.to_dict()))
    times = {"preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token"}
    assert set(plain["timings"]) == times
    assert [entry["token_id"] for entry in plain["logprobs"]] == answer.token_ids == plain["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in plain["logprobs"])


@pytest.mark.parametrize("sampling", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"seed": -1}])
def test_sampling_settings_out_of_range_are_refused(sampling):
    with pytest.raises(SettingsError):
        ask("what", **sampling) if "max_new_tokens" not in sampling else ask("what", (), 0)


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("", 0, "the prompt is empty"),
        (" \n", 1, "the prompt is empty"),
        (b"what", 0, "a prompt must be a str, not a bytes"),
        ("what \ud800", 0, "not valid Unicode"),
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
def test_images_that_are_not_a_list_are_refused_with_what_to_write(pruned, images):
    with pytest.raises(PromptError, match=r"must be a list of images.*write images=\[image\]"):
        pruned.stream("what", images)
    with pytest.raises(PromptError, match="a Request holds images, sampling and system"):
        pruned.stream(ask("what"), images)


def test_an_absent_image_is_refused_before_the_model_runs_and_named_by_its_number(pruned, photo, tmp_path):
    with pytest.raises(ImageError, match=r"^image 2 of 2: there is no image file"):
        pruned.stream("what <image><image>", [photo, tmp_path / "absent.png"])


def test_memory_of_a_batch_is_given_back(pruned, photos):
    """By what is left of numpy's arrays after it."""
    requests = [ask("what", [photos / name], 4) for name in PHOTOS]
    pruned.generate_batch(requests)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        answers = pruned.generate_batch(requests)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(answer, Answer) for answer in answers)
    assert not any(isinstance(answer, HivtpError) for answer in answers)
    assert held - before < 100_000 < peak - before
