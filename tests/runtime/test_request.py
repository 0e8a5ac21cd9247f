"""Whatever stands in a request, it is refused by an error of ours, and costs no other request its answer."""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hivtp import Answer, HivtpError, ImagePart, Message, Pipeline, Request, SamplingParams
from hivtp_ops.errors import ImageError, PromptError, SettingsError
from tests.support.answers import ask, at_most, same

NUM_CASES = 400


def test_a_request_holds_what_was_checked(pruned, photo):
    images, history = [photo], [Message("user", ["hello"]), Message("assistant", ["yes"])]
    request = Request("what", images, at_most(4), history=history)
    expected = pruned.generate(request)
    images.append(photo)
    history.clear()
    assert same(pruned.generate(request), expected)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"sampling": {"temperature": 0}}, SettingsError, r"sampling must be SamplingParams\(...\), not a dict"),
        ({"sampling": None}, SettingsError, "not a NoneType"),
        ({"has_marks": 1}, SettingsError, "has_marks must be True or False, not 1"),
        ({"history": "before"}, PromptError, "history must be a list of messages, not a str"),
        ({"history": ["before"]}, PromptError, "history must be a list of messages; it holds a str"),
        ({"history": None}, PromptError, "history must be a list of messages, not a NoneType"),
        ({"system": 3}, PromptError, "system must be a str, not a int"),
        ({"system": "\udfff"}, PromptError, "not valid Unicode"),
        ({"prompt": Message("user", ["what"]), "images": ["a.png"]}, PromptError, "a Message holds its images"),
        ({"prompt": Message("system", ["what"])}, PromptError, "must be the user's, not the system's"),
    ],
    ids=str,
)
def test_a_request_is_checked_where_it_is_written(fields, kind, message):
    with pytest.raises(kind, match=message):
        Request(**{"prompt": "what"} | fields)


def test_a_mark_is_text_where_the_prompt_is_somebody_elses(pruned, photo):
    with_mark, without = (Request(f"is {text} red", [photo], at_most(4), has_marks=False) for text in ("<image>", "it"))
    assert with_mark.message.parts[-1] == "is <image> red"
    assert len(with_mark.message.images) == 1
    answers = [pruned.generate(request) for request in (with_mark, without)]
    assert answers[0].num_prompt_tokens > answers[1].num_prompt_tokens
    assert answers[0].num_image_tokens == answers[1].num_image_tokens == 64


class Raising(Sequence):  # type: ignore[type-arg]
    """A list that fails when it is read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise KeyError("unreadable")


class Odd:
    """An object that fails wherever it is looked at."""

    def __fspath__(self) -> str:
        raise KeyError("nowhere")

    def __array__(self) -> Any:
        raise KeyError("nothing")

    def __repr__(self) -> str:
        raise KeyError("nameless")


def released() -> memoryview:
    view = memoryview(b"picture")
    view.release()
    return view


def closed() -> Image.Image:
    image = Image.new("RGB", (20, 20))
    image.close()
    return image


def lazy(cut: int) -> Image.Image:
    """A picture that is not decoded yet, and damaged."""
    file = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:-cut]))


def with_info(**info: Any) -> Image.Image:
    image = Image.new("RGB", (20, 20))
    image.info = {3: None, **info}
    return image


def test_an_image_that_cannot_be_read_is_an_image_error_and_costs_no_other_its_answer(pruned, photo):
    bad = [released, Odd, dict, lambda: None, bytes, lambda: np.zeros(3), closed, lambda: lazy(100)]
    good = ask("what", [photo], 4)
    results = pruned.generate_batch([one for make in bad for one in (good, ask("what", [make()], 4))])
    expected = pruned.generate(good)
    assert all(same(result, expected) for result in results[::2])
    assert [type(result) for result in results[1::2]] == [ImageError] * len(bad)
    for make in bad:
        with pytest.raises(ImageError):
            pruned.stream("what", [make()])


ANYTHING: list[Any] = [None, True, 0, -1, 10**400, math.nan, math.inf, Fraction(1, 3), 1j, b"", b"what", "", " ", "a"]
ANYTHING += ["<image>", "</s>", "{{ 1/0 }}", "\ud800", "\x00", "\ue0001\ue001", "a " * 600, [], {}, [[]], (), object()]
ANYTHING += [Odd(), Raising(), np.zeros(0), np.zeros((4, 4), object), np.float16(2), np.bool_(True), np.int64(3)]
ANYTHING += [Message("user", []), Message("assistant", ["yes"]), ImagePart(None), SamplingParams(max_new_tokens=2)]
IMAGES: list[Any] = [released, closed, lambda: lazy(100), lambda: lazy(30), lambda: with_info(exif=b"Exif\0\0odd" * 9)]
IMAGES += [lambda: with_info(exif=object()), lambda: with_info(icc_profile=3)]
IMAGES += [
    lambda mode=mode: Image.new(mode, (30, 9)) for mode in ("1", "L", "LA", "P", "PA", "CMYK", "F", "I;16", "HSV")
]
IMAGES += [lambda: np.zeros((9, 9, 3), np.uint8), lambda: np.zeros((9, 9)), lambda: np.zeros((0, 9, 3), np.uint8)]
IMAGES += [
    lambda: np.zeros((9, 9), "U3"),
    lambda: memoryview(b"GIF89a"),
    lambda: bytearray(b"\x89PNG\r\n"),
    lambda: "/",
]
FIELDS = ("prompt", "images", "sampling", "system", "history", "has_marks")
SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "logprobs")


def image(chance: random.Random) -> Any:
    return chance.choice(ANYTHING) if chance.random() < 0.3 else chance.choice(IMAGES)()


def request(chance: random.Random) -> Request:
    """One that is right but for a few of its fields."""
    fields: dict[str, Any] = {"prompt": "what is it", "sampling": at_most(2)}
    if chance.random() < 0.7:
        fields["images"] = [image(chance) for _ in range(chance.randint(0, 2))]
        marks = ["<image>"] * len(fields["images"])
        fields["prompt"] = chance.choice(["what " + " or ".join(marks)] * 5 + ["<image>", chance.choice(ANYTHING)])
    if chance.random() < 0.3:
        fields["history"] = [chance.choice([Message("user", ["a"]), Message("assistant", ["b"])]) for _ in range(2)]
    if chance.random() < 0.2:
        fields[chance.choice(FIELDS)] = chance.choice(ANYTHING)
    if chance.random() < 0.2:
        setting = {chance.choice(SETTINGS): chance.choice([*ANYTHING, 1, 0.5, ["a"]])}
        fields["sampling"] = SamplingParams(**{"max_new_tokens": 2} | setting)
    return Request(**fields)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_random_requests_gives_answers_and_our_errors_and_nothing_else(pruned: Pipeline, photo, seed):
    chance, good, requests = random.Random(seed), ask("what", [photo], 4), []
    refused: list[HivtpError] = []
    for _ in range(NUM_CASES):
        try:
            requests += [request(chance)]
        except HivtpError as error:
            refused.append(error)
    expected = pruned.generate(good)
    results = pruned.generate_batch([good, *requests, good])
    assert same(results[0], expected)
    assert same(results[-1], expected)
    answers = [result for result in results if isinstance(result, Answer)]
    errors = [result for result in results if isinstance(result, HivtpError)]
    assert len(answers) + len(errors) == len(results)
    assert min(len(answers), len(errors), len(refused)) > NUM_CASES / 10
    for error in [*refused, *errors]:
        assert str(error)
        assert "please report this" not in str(error), error


def requests_of(seed: int, number: int) -> list[Request]:
    chance, requests = random.Random(seed), []
    while len(requests) < number:
        with contextlib.suppress(HivtpError):
            requests.append(request(chance))
    return requests


def test_each_request_of_a_batch_gives_what_it_gives_alone_or_fails_alike(pruned):
    # Made twice, since Pillow notes in an image what it could not read.
    together, alone = requests_of(7, 40), requests_of(7, 40)
    for result, one in zip(pruned.generate_batch(together), alone, strict=True):
        if isinstance(result, HivtpError):
            with pytest.raises(type(result)) as caught:
                pruned.generate(one)
            assert str(caught.value) == str(result)
        elif one.sampling.temperature is None:
            assert same(result, pruned.generate(one))
