from __future__ import annotations

import math
from fractions import Fraction
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import HivtpError, Request, SamplingParams
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.language.kv_cache import BoundSlots, KvCache
from hivtp_ops.errors import EngineError, ImageError, OutOfMemoryError, PromptError, SettingsError
from tests.support.answers import PHOTOS, alone, ask, load, same, with_language

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hivtp import Answer, Pipeline

NUM_TOKENS = 25


@pytest.fixture
def requests_of_all_kinds(photos: Path) -> list[Request]:
    files = [photos / name for name in PHOTOS]
    return [
        ask("What is in the picture?", [files[0]], NUM_TOKENS),
        ask("how many dogs", (), 7),
        ask("Is <image> brighter than <image>?", [files[1], files[2]], NUM_TOKENS),
        ask("where is it <image>", [files[3]], 1),
        ask("a " * 200, (), NUM_TOKENS),
        ask("What is in the picture?", [files[4]], 12),
        ask("What is in the picture?", [files[0]], NUM_TOKENS),
    ]


def assert_as_alone(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer]:
    answers = pipeline.generate_batch(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(pipeline, request))
    return answers


@pytest.mark.parametrize("bundle", ["unpruned", "pruned", "varying"])
def test_each_answer_equals_the_one_it_gives_alone(pipelines, requests_of_all_kinds, bundle) -> None:
    answers = assert_as_alone(pipelines[bundle], requests_of_all_kinds)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers) - 1


def test_requests_that_end_early_leave_the_others_alone(unpruned, requests_of_all_kinds) -> None:
    ending = with_language(unpruned, eos_token_ids=tuple(range(3, 512, 9)))
    answers = assert_as_alone(ending, requests_of_all_kinds)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert len({len(answer.token_ids) for answer in answers}) > 3


def test_sampling_follows_the_seed_of_each_request(pruned, photos) -> None:
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "logprobs": 1, "repetition_penalty": 1.1}
    requests = [
        ask("how many dogs", [photos / name], NUM_TOKENS, seed=seed, **settings)
        for seed, name in enumerate((*PHOTOS, PHOTOS[0]))
    ]
    answers = assert_as_alone(pruned, requests)
    assert answers[0].token_ids != answers[-1].token_ids


def test_more_requests_than_a_few(pruned, photos) -> None:
    assert_as_alone(
        pruned,
        [
            ask("what " * length, [photos / name], 1 + length % 13)
            for length, name in zip(range(1, 41), cycle(PHOTOS), strict=False)
        ],
    )


def test_a_batch_of_one_and_of_none(pruned, photo) -> None:
    assert_as_alone(pruned, [ask("What is in the picture?", [photo], NUM_TOKENS)])
    assert pruned.generate_batch([]) == []


@pytest.mark.parametrize("requests", ["what", b"what", None, 3, iter(())])
def test_what_is_not_a_list_is_refused(pruned, requests) -> None:
    with pytest.raises(PromptError, match=f"requests must be a list of Request, not {type(requests).__name__}"):
        pruned.generate_batch(requests)


def test_all_images_go_through_the_vision_graph_together(pruned_bundle, photos, monkeypatch) -> None:
    pipeline = load(pruned_bundle)
    engine, num_tiles = pipeline.model.images._encoder._vision.engine, []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda inputs: num_tiles.append(len(inputs["pixel_values"])) or run(inputs))
    pipeline.generate_batch([ask("what", [photos / name], 2) for name in PHOTOS] + [ask("what", (), 2)])
    assert num_tiles == [5]


def test_requests_decode_in_joint_steps(unpruned, monkeypatch) -> None:
    shapes = []
    run = BoundSlots.run
    monkeypatch.setattr(
        BoundSlots,
        "run",
        lambda self, embeds, lengths: shapes.append(embeds.shape[:2]) or run(self, embeds, lengths),
    )
    unpruned.generate_batch([ask("what", (), num) for num in (4, 2, 1, 4)])
    length = shapes[0][1]
    # The last step spans the two between the first and the last, which have ended.
    assert shapes == [(1, length)] * 4 + [(4, 1), (4, 1), (4, 1)]


def test_bad_requests_lose_no_other(unpruned, photo, tmp_path) -> None:
    good = ask("What is in the picture?", [photo], NUM_TOKENS)
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:500])
    bad = [
        ("no request", PromptError, "a batch holds a Request for each answer, not a str"),
        (None, PromptError, "a batch holds a Request for each answer, not a NoneType"),
        (ask("what", [tmp_path / "absent.png"]), ImageError, "there is no image file"),
        (ask("what", [broken]), ImageError, ""),
        (ask("what", [{}]), ImageError, "an image cannot be a dict"),
        (ask("a " * 600), PromptError, "the context of this model holds 512"),
        (ask("what " + "<image>" * 8, [photo] * 8), PromptError, "the context of this model holds 512"),
    ]
    requests = [request for bad_request, _, _ in bad for request in (good, bad_request)]
    answers = unpruned.generate_batch(requests)
    single = alone(unpruned, good)
    assert all(same(answer, single) for answer in answers[::2])
    for answer, (_, kind, message) in zip(answers[1::2], bad, strict=True):
        assert isinstance(answer, kind)
        assert message in str(answer)
    assert all(isinstance(answer, HivtpError) for answer in unpruned.generate_batch(requests[1::2]))


def test_what_cannot_work_is_refused_where_the_request_is_written(photo) -> None:
    """Before any batch: see test_sampling.py and test_pipeline.py for all of them."""
    for settings in ({"max_new_tokens": 0}, {"temperature": 10**400}, {"top_p": Fraction(1, 2)}, {"seed": math.nan}):
        with pytest.raises(SettingsError):
            SamplingParams(**settings)
    for prompt, images in (("", ()), ("what <image>", ()), ("what", photo), (3, ())):
        with pytest.raises(PromptError):
            Request(prompt, images)


def test_an_image_that_fails_in_the_vision_graph_costs_only_its_request(
    pruned, pruned_bundle, photos, monkeypatch
) -> None:
    pipeline = load(pruned_bundle)
    engine = pipeline.model.images._encoder._vision.engine
    run = engine.run
    marked = pipeline.model.images.prepare(load_image(photos / PHOTOS[2])).pixel_values[0]

    def fail(inputs: dict[str, Any]) -> Any:
        if any(np.array_equal(tile, marked) for tile in inputs["pixel_values"]):
            raise MemoryError
        return run(inputs)

    monkeypatch.setattr(engine, "run", fail)
    requests = [ask("what", [photos / name], 5) for name in PHOTOS]
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
    long = len(unpruned.model.prepare(requests_of_all_kinds[4]).token_ids)
    expected = [alone(unpruned, request) for request in requests_of_all_kinds]
    run = BoundSlots.run

    def fail(self: BoundSlots, embeds: Any, lengths: Any) -> Any:
        if long + failing_step in lengths:
            raise raised("no room")
        return run(self, embeds, lengths)

    monkeypatch.setattr(BoundSlots, "run", fail)
    answers = unpruned.generate_batch(requests_of_all_kinds)
    assert isinstance(answers[4], kind)
    assert "no room" in str(answers[4])
    del answers[4], expected[4]
    assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))


@pytest.mark.parametrize("num_slots_that_fit", [0, 1, 3])
def test_without_memory_for_all_at_once_they_are_decoded_in_parts(
    unpruned, requests_of_all_kinds, monkeypatch, num_slots_that_fit
) -> None:
    allocate, sizes = KvCache._allocate, []

    def short(self: KvCache) -> Any:
        sizes.append(self.num_slots)
        if self.num_slots > num_slots_that_fit:
            raise MemoryError
        return allocate(self)

    expected = [alone(unpruned, request) for request in requests_of_all_kinds]
    monkeypatch.setattr(KvCache, "_allocate", short)
    answers = unpruned.generate_batch(requests_of_all_kinds)
    if num_slots_that_fit:
        assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))
    else:
        assert all(isinstance(answer, OutOfMemoryError) for answer in answers)
    # Halves, and halves of these, and no smaller than they must be.
    order = list(dict.fromkeys(sizes))
    assert order == {0: [7, 3, 1, 2, 4], 1: [7, 3, 1, 2, 4], 3: [7, 3, 4, 2]}[num_slots_that_fit]


def test_timings_are_positive_and_of_the_steps_a_request_took_part_in(pruned, photo) -> None:
    requests = [ask("what", [photo], num) for num in (1, 8)]
    first, second = (answer.timings for answer in pruned.generate_batch(requests))
    assert first.decode_ms_per_token is None
    assert second.decode_ms_per_token > 0
    assert first.vision_ms == second.vision_ms > 0
    assert first.ttft_ms == first.preprocess_ms + first.vision_ms + first.prefill_ms


def test_llava_next_images_of_mixed_sizes(photos, tmp_path) -> None:
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="llava_next", text=text)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(preset="192"), is_quiet=True)
    pipeline = load(bundle.folder, cache_bytes=0)
    sizes = [(128, 64), (64, 192), (451, 300), (900, 70), (3, 2)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=True)]
    requests = [ask("What is it?", [picture], 10) for picture in pictures]
    requests.append(ask("<image> or <image>", pictures[:2], 10))
    answers = assert_as_alone(pipeline, requests)
    assert len({answer.num_kept_tokens for answer in islice(answers, 5)}) > 2
