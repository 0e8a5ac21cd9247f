from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import HivtpError, Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.language import kv_cache, onnxruntime
from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.language.sampling import Sampler, SamplingSettings
from hivtp_ops.errors import EngineError, ImageError, OutOfMemoryError, PromptError, SettingsError
from tests.support.answers import alone, same

if TYPE_CHECKING:
    from pathlib import Path

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")
NUM_TOKENS = 25


def with_ends(pipeline: Pipeline, *ends: int) -> Pipeline:
    """The same bundle with other end-of-sequence tokens."""
    ending = Pipeline.load(pipeline.bundle.folder, num_threads=1)
    ending.language.manifest = replace(ending.language.manifest, eos_token_ids=ends)
    return ending


@pytest.fixture
def requests_of_all_kinds(photos: Path) -> list[Request]:
    files = [photos / name for name in PHOTOS]
    return [
        Request("What is in the picture?", [files[0]], NUM_TOKENS),
        Request("how many dogs", (), 7),
        Request("Is <image> brighter than <image>?", [files[1], files[2]], NUM_TOKENS),
        Request("where is it <image>", [files[3]], 1),
        Request("a " * 200, (), NUM_TOKENS),
        Request("What is in the picture?", [files[4]], 12),
        Request("What is in the picture?", [files[0]], NUM_TOKENS),
    ]


@pytest.mark.parametrize("bundle", ["unpruned", "pruned", "varying"])
def test_each_answer_equals_the_one_it_gives_alone(pipelines, requests_of_all_kinds, bundle) -> None:
    pipeline = pipelines[bundle]
    answers = pipeline.generate_batch(requests_of_all_kinds)
    for request, answer in zip(requests_of_all_kinds, answers, strict=True):
        assert same(answer, alone(pipeline, request))
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers) - 1


def test_rows_that_end_early_leave_the_others_alone(unpruned, requests_of_all_kinds) -> None:
    ending = with_ends(unpruned, *range(3, 512, 9))
    answers = ending.generate_batch(requests_of_all_kinds)
    for request, answer in zip(requests_of_all_kinds, answers, strict=True):
        assert same(answer, alone(ending, request))
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert len({len(answer.token_ids) for answer in answers}) > 3


def test_sampling_follows_the_seed_of_each_request(pruned, photos) -> None:
    requests = [
        Request("how many dogs", [photos / name], NUM_TOKENS, temperature=1.0, top_k=50, top_p=0.9, seed=seed)
        for seed, name in enumerate((*PHOTOS, PHOTOS[0]))
    ]
    answers = pruned.generate_batch(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(pruned, request))
    assert answers[0].token_ids != answers[-1].token_ids


def test_random_embeddings_give_what_they_give_alone(unpruned) -> None:
    language = with_ends(unpruned, *range(40)).language
    random = np.random.default_rng(3)
    for _ in range(15):
        sequences = [
            (random.normal(size=(random.integers(1, 450), 64)).astype(np.float32), int(random.integers(1, 90)), seed)
            for seed in range(random.integers(1, 7))
        ]

        def sampler(seed: int) -> Sampler:
            return Sampler(SamplingSettings(temperature=seed % 2, seed=seed))

        tokens: list[list[int]] = [[] for _ in sequences]
        for step in language.generate_batch([DecodeRequest(embeds, num, sampler(n)) for embeds, num, n in sequences]):
            for index, token_id in step.items():
                tokens[index].append(token_id)
        assert tokens == [list(language.generate(embeds, num, sampler(n))) for embeds, num, n in sequences]


def test_more_requests_than_a_few(pruned, photos) -> None:
    requests = [
        Request("what " * length, [photos / name], 1 + length % 13)
        for length, name in zip(range(1, 41), cycle(PHOTOS), strict=False)
    ]
    for request, answer in zip(requests, pruned.generate_batch(requests), strict=True):
        assert same(answer, alone(pruned, request))


def test_a_batch_of_one_and_of_none(pruned, photo) -> None:
    request = Request("What is in the picture?", [photo], NUM_TOKENS)
    [answer] = pruned.generate_batch([request])
    assert same(answer, alone(pruned, request))
    assert pruned.generate_batch([]) == []


def test_all_images_go_through_the_vision_graph_together(pruned, photos, monkeypatch) -> None:
    pipeline = Pipeline.load(pruned.bundle.folder, num_threads=1)
    engine, num_tiles = pipeline.images._encoder._vision.engine, []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda inputs: num_tiles.append(len(inputs["pixel_values"])) or run(inputs))
    pipeline.generate_batch([Request("what", [photos / name], 2) for name in PHOTOS] + [Request("what", (), 2)])
    assert num_tiles == [5]


def test_rows_decode_in_joint_steps(unpruned, monkeypatch) -> None:
    shapes = []

    class Counted(kv_cache.BoundRows):
        def run(self, embeds: Any, lengths: Any) -> Any:
            shapes.append(embeds.shape[:2])
            return super().run(embeds, lengths)

    monkeypatch.setattr(onnxruntime, "BoundRows", Counted)
    unpruned.generate_batch([Request("what", (), num) for num in (4, 2, 1, 4)])
    length = shapes[0][1]
    assert shapes == [(1, length)] * 4 + [(3, 1), (2, 1), (2, 1)]


def test_bad_requests_lose_no_other(unpruned, photo, tmp_path) -> None:
    good = Request("What is in the picture?", [photo], NUM_TOKENS)
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:500])
    bad = [
        (Request("", [photo]), PromptError, "the prompt is empty"),
        (Request("what", [tmp_path / "absent.png"]), ImageError, "there is no image file"),
        (Request("what", [broken]), ImageError, ""),
        (Request("a " * 600), PromptError, "the context of this model holds 512"),
        (Request("what " + "<image>" * 8, [photo] * 8), PromptError, "the context of this model holds 512"),
        (Request("what <image>"), PromptError, "has 1 <image> marks and 0 images were given"),
        (Request("what", photo), PromptError, "must be a list of images"),
    ]
    requests = [request for bad_request, _, _ in bad for request in (good, bad_request)]
    answers = unpruned.generate_batch(requests)
    single = alone(unpruned, good)
    assert all(same(answer, single) for answer in answers[::2])
    for answer, (_, kind, message) in zip(answers[1::2], bad, strict=True):
        assert isinstance(answer, kind)
        assert message in str(answer)
    assert all(isinstance(answer, HivtpError) for answer in unpruned.generate_batch(requests[1::2]))


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"seed": -1}])
def test_settings_that_cannot_work_are_refused_where_the_request_is_written(settings) -> None:
    with pytest.raises(SettingsError):
        Request("what", **settings)


def test_an_image_that_fails_in_the_vision_graph_costs_only_its_request(pruned, photos, monkeypatch) -> None:
    pipeline = Pipeline.load(pruned.bundle.folder, num_threads=1)
    engine = pipeline.images._encoder._vision.engine
    run = engine.run
    marked = pipeline.images.prepare(load_image(photos / PHOTOS[2])).pixel_values[0]

    def fail(inputs: dict[str, Any]) -> Any:
        if any(np.array_equal(tile, marked) for tile in inputs["pixel_values"]):
            raise MemoryError
        return run(inputs)

    monkeypatch.setattr(engine, "run", fail)
    requests = [Request("what", [photos / name], 5) for name in PHOTOS]
    answers = pipeline.generate_batch(requests)
    assert isinstance(answers[2], OutOfMemoryError)
    for index in (0, 1, 3, 4):
        assert same(answers[index], alone(pruned, requests[index]))


@pytest.mark.parametrize("failing_step", [0, 5])
@pytest.mark.parametrize(("raised", "kind"), [(MemoryError, OutOfMemoryError), (EngineError, EngineError)])
def test_a_sequence_that_fails_in_the_decoder_costs_only_its_request(
    unpruned, requests_of_all_kinds, monkeypatch, failing_step, raised, kind
) -> None:
    """In its prefill, and in a later step, where the joint run fails with it."""
    long = len(unpruned.prepare(requests_of_all_kinds[4].prompt, ()).token_ids)

    class Failing(kv_cache.BoundRows):
        def run(self, embeds: Any, lengths: Any) -> Any:
            if long + failing_step in lengths:
                raise raised("no room")
            return super().run(embeds, lengths)

    expected = [alone(unpruned, request) for request in requests_of_all_kinds]
    monkeypatch.setattr(onnxruntime, "BoundRows", Failing)
    answers = unpruned.generate_batch(requests_of_all_kinds)
    assert isinstance(answers[4], kind)
    assert "no room" in str(answers[4])
    del answers[4], expected[4]
    assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))


@pytest.mark.parametrize("num_rows_that_fit", [0, 1, 3])
def test_without_memory_for_all_rows_they_are_decoded_in_parts(
    unpruned, requests_of_all_kinds, monkeypatch, num_rows_that_fit
) -> None:
    def allocate(manifest: Any, num_rows: int, capacity: int) -> Any:
        if num_rows > num_rows_that_fit:
            raise MemoryError
        return kv_cache.allocate_cache(manifest, num_rows, capacity)

    expected = [alone(unpruned, request) for request in requests_of_all_kinds]
    monkeypatch.setattr(onnxruntime, "allocate_cache", allocate)
    answers = unpruned.generate_batch(requests_of_all_kinds)
    if num_rows_that_fit:
        assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))
    else:
        assert all(isinstance(answer, OutOfMemoryError) for answer in answers)


def test_logits_that_cannot_be_used_cost_only_their_request(unpruned) -> None:
    language, random = unpruned.language, np.random.default_rng(0)
    embeds = [random.normal(size=(length, 64)).astype(np.float32) for length in (5, 9, 30)]
    embeds[1][3] = np.nan
    steps = list(language.generate_batch([DecodeRequest(item, 6, Sampler(SamplingSettings())) for item in embeds]))
    assert isinstance(steps[1][1], EngineError)
    assert [list(step) for step in steps] == [[0], [1], [2]] + [[0, 2]] * 5
    for index in (0, 2):
        tokens = [step[index] for step in steps if index in step]
        assert tokens == list(language.generate(embeds[index], 6, Sampler(SamplingSettings())))


def test_timings_are_positive_and_of_the_steps_a_request_took_part_in(pruned, photo) -> None:
    requests = [Request("what", [photo], num) for num in (1, 8)]
    first, second = (answer.timings for answer in pruned.generate_batch(requests))
    assert first.decode_ms_per_token is None
    assert second.decode_ms_per_token > 0
    assert first.vision_ms == second.vision_ms > 0
    assert first.ttft_ms == first.preprocess_ms + first.vision_ms + first.prefill_ms


def test_llava_next_pictures_of_mixed_sizes(photos, tmp_path) -> None:
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="llava_next", text=text)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(preset="192"), is_quiet=True)
    pipeline = Pipeline.load(bundle.folder, num_threads=1, image_cache_bytes=0)
    sizes = [(128, 64), (64, 192), (451, 300), (900, 70), (3, 2)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=True)]
    requests = [Request("What is it?", [picture], 10) for picture in pictures]
    requests.append(Request("<image> or <image>", pictures[:2], 10))
    for request, answer in zip(requests, pipeline.generate_batch(requests), strict=True):
        assert same(answer, alone(pipeline, request))
    assert len({answer.num_kept_tokens for answer in islice(pipeline.generate_batch(requests), 5)}) > 2
