from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.miniature.pictures import (
    CALIBRATION,
    COLOURS,
    GRID,
    HELD_OUT,
    KINDS,
    PATCH,
    SIDE,
    TRAINING,
    Picture,
    Shape,
    draw,
)

SEEDS = range(200)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [draw(seed) for seed in SEEDS]


def the_only(picture: Picture, *, shape: str | None = None, colour: str | None = None) -> Shape:
    (found,) = [thing for thing in picture.shapes if shape in {None, thing.shape} and colour in {None, thing.colour}]
    return found


def answer_by_geometry(picture: Picture, text: str) -> str:
    """The answer by another way than the generator's: from the text and what is on the picture."""
    if match := re.fullmatch(r"What colour is the (\w+)\?", text):
        return the_only(picture, shape=match[1]).colour
    if match := re.fullmatch(r"Which shape is (\w+)\?", text):
        return the_only(picture, colour=match[1]).shape
    if match := re.fullmatch(r"Where is the (\w+)\?", text):
        thing = the_only(picture, shape=match[1])
        vertical = "top" if thing.row < 32 else "bottom" if thing.row >= 64 else ""
        horizontal = "left" if thing.column < 32 else "right" if thing.column >= 64 else ""
        return f"{vertical} {horizontal}".strip() or "middle"
    if text == "How many shapes are there?":
        return {3: "three", 4: "four", 5: "five", 6: "six"}[len(picture.shapes)]
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", text):
        return "yes" if (match[1], match[2]) in {(thing.colour, thing.shape) for thing in picture.shapes} else "no"
    if text == "What number is shown?":
        return str(picture.number)
    match = re.fullmatch(r"Is the (\w+) (left of|above) the (\w+)\?", text)
    assert match is not None, text
    first, second = the_only(picture, shape=match[1]), the_only(picture, shape=match[3])
    is_so = first.column < second.column if match[2] == "left of" else first.row < second.row
    return "yes" if is_so else "no"


def test_a_seed_gives_the_same_picture_each_time_and_another_seed_another():
    first, again, other = draw(5), draw(5), draw(6)
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions
    assert np.array_equal(first.foreground, again.foreground)
    assert not np.array_equal(first.image, other.image)


def test_training_calibration_and_measuring_share_no_seed():
    ranges = (TRAINING, CALIBRATION, HELD_OUT)
    assert TRAINING.start == 0
    assert all(one.stop <= other.start for one, other in itertools.pairwise(ranges))


def test_every_picture_has_a_question_of_each_kind_and_each_answer_is_right(pictures):
    for picture in pictures:
        assert tuple(question.kind for question in picture.questions) == KINDS
        for question in picture.questions:
            assert question.answer == answer_by_geometry(picture, question.text), question


def test_no_answer_is_known_from_its_question(pictures):
    """The best constant guess for a kind stays near what its number of answers allows."""
    most = {"colour": 0.3, "shape": 0.35, "where": 0.25, "count": 0.4, "exist": 0.65, "number": 0.1, "relation": 0.65}
    for column, kind in enumerate(KINDS):
        answers = Counter(picture.questions[column].answer for picture in pictures)
        assert answers.most_common(1)[0][1] <= most[kind] * len(pictures), (kind, answers)


def test_a_shape_has_its_colour_at_its_centre(pictures):
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    for picture in pictures:
        pixels = np.asarray(picture.image).astype(float)
        for thing in picture.shapes:
            row, column = int(thing.row), int(thing.column)
            colour = pixels[row - 1 : row + 2, column - 1 : column + 2].mean(axis=(0, 1))
            assert names[np.abs(values - colour).sum(axis=1).argmin()] == thing.colour


def test_shapes_touch_neither_each_other_nor_the_edge(pictures):
    for picture in pictures:
        for index, one in enumerate(picture.shapes):
            assert one.radius < min(one.row, one.column, SIDE - one.row, SIDE - one.column)
            for other in picture.shapes[:index]:
                assert math.dist((one.row, one.column), (other.row, other.column)) > one.radius + other.radius


def test_the_number_is_written_in_bright_pixels_where_it_is_said_to_be(pictures):
    shown: dict[int, np.ndarray] = {}
    for picture in pictures:
        top, left = picture.number_at
        is_bright = np.asarray(picture.image).min(axis=2)[top : top + 14, left : left + 22] > 190
        assert shown.setdefault(picture.number, is_bright).shape == (14, 22)
        assert np.array_equal(shown[picture.number], is_bright), "a number looks the same wherever it stands"
    digits = {number: (mask[:, :10], mask[:, 12:]) for number, mask in shown.items()}
    for number, (tens, _) in digits.items():
        for other, (_, ones) in digits.items():
            assert np.array_equal(tens, ones) == (number // 10 == other % 10)


def test_the_foreground_is_where_the_shapes_and_the_number_are(pictures):
    for picture in pictures:
        foreground = picture.foreground.reshape(GRID, GRID)
        assert picture.foreground.shape == (GRID * GRID,)
        assert picture.foreground.dtype == np.bool_
        may_show = np.zeros((GRID, GRID), bool)
        for thing in picture.shapes:
            assert foreground[int(thing.row) // PATCH, int(thing.column) // PATCH]
            rows = slice(int(thing.row - thing.radius - 1) // PATCH, int(thing.row + thing.radius + 1) // PATCH + 1)
            columns = slice(
                max(int(thing.column - thing.radius - 1), 0) // PATCH,
                int(thing.column + thing.radius + 1) // PATCH + 1,
            )
            may_show[rows, columns] = True
        top, left = picture.number_at
        may_show[top // PATCH : (top + 13) // PATCH + 1, left // PATCH : (left + 21) // PATCH + 1] = True
        assert not (foreground & ~may_show).any()
        assert foreground[(top + 7) // PATCH, left // PATCH : (left + 21) // PATCH + 1].any()


def test_owners_tell_what_each_foreground_patch_shows(pictures):
    for picture in pictures:
        assert picture.foreground[picture.owners >= 0].all()
        # The rest of the foreground are slivers.
        assert (picture.owners[picture.foreground] >= 0).mean() > 0.7
        for index, thing in enumerate(picture.shapes):
            rows, columns = np.divmod(np.flatnonzero(picture.owners == index), GRID)
            centres = np.hypot((rows + 0.5) * PATCH - thing.row, (columns + 0.5) * PATCH - thing.column)
            assert len(rows) >= 1
            assert (centres < thing.radius + PATCH).all()
