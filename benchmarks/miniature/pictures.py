"""Pictures of coloured shapes and a number on a textured ground, with questions about them: drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 96
PATCH = 8
GRID = SIDE // PATCH
# Seeds of pictures to learn from, to choose settings by, and to measure with: they share none.
TRAINING = range(1_000_000_000)
CALIBRATION = range(1_000_000_000, 1_000_001_000)
HELD_OUT = range(2_000_000_000, 2_000_010_000)

KINDS = ("colour", "shape", "where", "count", "exist", "number", "relation")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (230, 45, 45),
    "green": (40, 190, 70),
    "blue": (60, 110, 250),
    "yellow": (250, 225, 40),
    "purple": (200, 75, 230),
    "white": (245, 245, 245),
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUM_SHAPES = range(3, 7)

# Rows of a 5 x 7 font, one bit per pixel, highest bit left.
_FONT = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 2, 4, 8, 31),
    (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)
_DIGIT_HEIGHT, _DIGIT_WIDTH, _DIGIT_GAP = 14, 10, 2
_GLYPHS = (
    np.array([[[bits >> (4 - column) & 1 for column in range(5)] for bits in rows] for rows in _FONT], dtype=bool)
    .repeat(2, axis=1)
    .repeat(2, axis=2)
)
# Pixels of a patch that something must cover for the patch to show it.
_MIN_PIXELS = 4
# Pixels between the centre of a shape and the lines that part the nine places, and between two shapes compared.
_CLEAR_OF_LINES, _CLEAR_APART = 3.0, 12.0


@dataclass(frozen=True)
class Question:
    """One question and its one right answer.

    Args:
        kind: one of KINDS.
        text: the question in plain English.
        answer: one or two words, or two digits.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Shape:
    """A coloured shape: its names, its centre and its radius in pixels."""

    shape: str
    colour: str
    row: float
    column: float
    radius: float

    @property
    def place(self) -> int:
        """The ninth of the picture that holds the centre: an index into PLACES."""
        return int(self.row * 3 / SIDE) * 3 + int(self.column * 3 / SIDE)


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows, and a question of each kind.

    Args:
        image: RGB, SIDE x SIDE.
        questions: one of each kind, in the order of KINDS.
        foreground: bool [144], raster order: the patches that show any pixel of a shape or of a digit.
        shapes: what is on it.
        number: the number on it, 10 to 99.
        number_at: row and column of the number's top left pixel.
        owners: int [144], raster order: what a patch shows most of: an index into `shapes`; len(shapes) for
            the number's first digit, one more for its second; -1 for the ground, and for next to nothing of a thing.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    foreground: NDArray[np.bool_]
    shapes: tuple[Shape, ...]
    number: int
    number_at: tuple[int, int]
    owners: NDArray[np.int64]


def draw(seed: int) -> Picture:
    """The picture of a seed: a pure function of it."""
    random = np.random.default_rng(seed)
    shapes = number_at = None
    while shapes is None or number_at is None:
        number_at = (int(random.integers(1, SIDE - 15)), int(random.integers(1, SIDE - 23)))
        shapes = _place_shapes(random, _choose_shapes(random), number_at)
    number = int(random.integers(10, 100))
    pixels, owner = _paint(random, shapes, number, number_at)
    owners = _patch_owners(owner, len(shapes) + 2)
    return Picture(
        image=Image.fromarray(pixels),
        questions=_ask(random, shapes, number),
        foreground=_patches(owner >= 0).any(axis=1),
        shapes=shapes,
        number=number,
        number_at=number_at,
        owners=owners,
    )


def _choose_shapes(random: np.random.Generator) -> list[tuple[str, str]]:
    """Different pairs of shape and colour, of which two shapes and one colour are on the picture once."""
    count = int(random.integers(NUM_SHAPES.start, NUM_SHAPES.stop))
    while True:
        pairs = random.permutation(len(SHAPES) * len(COLOURS))[:count]
        shapes = [SHAPES[pair % len(SHAPES)] for pair in pairs]
        colours = [list(COLOURS)[pair // len(SHAPES)] for pair in pairs]
        if len(_only_once(shapes)) >= 2 and _only_once(colours):
            return list(zip(shapes, colours, strict=True))


def _only_once(names: list[str]) -> list[str]:
    return [name for name in names if names.count(name) == 1]


def _place_shapes(
    random: np.random.Generator, pairs: list[tuple[str, str]], number_at: tuple[int, int]
) -> tuple[Shape, ...] | None:
    """Places that touch neither each other nor the number; None where these could not be found."""
    top, left = number_at
    placed: list[Shape] = []
    for shape, colour in pairs:
        for _ in range(60):
            radius = random.uniform(6.5, 9.0)
            row, column = random.uniform(radius + 1, SIDE - radius - 1, size=2).tolist()
            is_clear = all(
                abs(at - line) >= _CLEAR_OF_LINES for at in (row, column) for line in (SIDE / 3, SIDE * 2 / 3)
            )
            below = max(top - row, row - (top + _DIGIT_HEIGHT), 0.0)
            beside = max(left - column, column - (left + 2 * _DIGIT_WIDTH + _DIGIT_GAP), 0.0)
            is_free = below**2 + beside**2 > (radius + 2) ** 2 and all(
                (row - other.row) ** 2 + (column - other.column) ** 2 > (radius + other.radius + 2) ** 2
                for other in placed
            )
            if is_clear and is_free:
                placed.append(Shape(shape, colour, row, column, radius))
                break
        else:
            return None
    return tuple(placed)


def _paint(
    random: np.random.Generator, shapes: tuple[Shape, ...], number: int, number_at: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels [SIDE, SIDE, 3], and for each pixel what it belongs to, as in `Picture.owners`."""
    canvas = _ground(random)
    owner = np.full((SIDE, SIDE), -1)
    for index, shape in enumerate(shapes):
        top, left = int(shape.row - shape.radius) - 1, int(shape.column - shape.radius) - 1
        size = int(2 * shape.radius) + 4
        window = np.s_[max(top, 0) : min(top + size, SIDE), max(left, 0) : min(left + size, SIDE)]
        rows, columns = np.ogrid[window]
        distance = _distance(shape.shape, rows + 0.5 - shape.row, columns + 0.5 - shape.column, shape.radius)
        opacity = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        colour = np.array(COLOURS[shape.colour]) + random.uniform(-18, 18, size=3)
        canvas[window] += opacity * (colour - canvas[window])
        owner[window][opacity[..., 0] > 0.5] = index
    shade = random.uniform(215, 255)
    top, left = number_at
    for place, digit in enumerate(divmod(number, 10)):
        column = left + place * (_DIGIT_WIDTH + _DIGIT_GAP)
        window = np.s_[top : top + _DIGIT_HEIGHT, column : column + _DIGIT_WIDTH]
        canvas[window][_GLYPHS[digit]] = shade
        owner[window][_GLYPHS[digit]] = len(shapes) + place
    canvas += random.integers(-10, 11, size=canvas.shape, dtype=np.int8)
    return canvas.clip(0, 255).astype(np.uint8), owner


def _ground(random: np.random.Generator) -> NDArray[Any]:
    """A ground of a dark tone with a soft pattern of a random grain: float32 [SIDE, SIDE, 3]."""
    num_knots = int(random.integers(4, 14))
    at = np.linspace(0, num_knots - 1, SIDE)
    knots = np.arange(num_knots)
    blend = np.clip(1 - np.abs(at[:, None] - knots), 0, 1).astype(np.float32)
    grain = random.normal(scale=11, size=(3, num_knots, num_knots)).astype(np.float32)
    tone = random.uniform(35, 85, size=3).astype(np.float32)
    return (blend @ grain @ blend.T).transpose(1, 2, 0) + tone


def _distance(shape: str, y: NDArray[Any], x: NDArray[Any], radius: float) -> NDArray[Any]:
    """Distance of pixels from the edge of a shape: negative within."""
    if shape == "circle":
        return np.hypot(y, x) - radius
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.85 * radius
    if shape == "diamond":
        return (np.abs(y) + np.abs(x) - 1.1 * radius) * 0.7
    if shape == "cross":
        bar = 0.34 * radius
        return np.minimum(
            np.maximum(np.abs(y) - bar, np.abs(x) - radius), np.maximum(np.abs(y) - radius, np.abs(x) - bar)
        )
    return np.maximum(y - 0.8 * radius, (np.abs(x) * 1.8 - (y + radius)) * 0.5)


def _patches(pixels: NDArray[Any]) -> NDArray[Any]:
    """The pixels [SIDE, SIDE] by patch: [144, PATCH * PATCH]."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, PATCH * PATCH)


def _patch_owners(owner: NDArray[np.int64], num_things: int) -> NDArray[np.int64]:
    patches = _patches(owner)
    covered = np.stack([(patches == thing).sum(axis=1) for thing in range(num_things)])
    return np.where(covered.max(axis=0) >= _MIN_PIXELS, covered.argmax(axis=0), -1)


def _ask(random: np.random.Generator, shapes: tuple[Shape, ...], number: int) -> tuple[Question, ...]:
    """One question of each kind, in the order of KINDS."""

    def choose(things: list[Any]) -> Any:
        return things[int(random.integers(len(things)))]

    single_shapes = _only_once([shape.shape for shape in shapes])
    single_colours = _only_once([shape.colour for shape in shapes])
    by_shape = {shape.shape: shape for shape in shapes}
    by_colour = {shape.colour: shape for shape in shapes}
    asked, sought, found = choose(single_colours), choose(single_shapes), choose(single_shapes)

    pairs = {(shape.colour, shape.shape) for shape in shapes}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in pairs]
    # Of pairs that are not there, those of a colour and a shape that are there apart are the hard ones.
    near = [pair for pair in absent if pair[0] in by_colour and pair[1] in by_shape]
    is_there = random.random() < 0.5
    colour, shape = choose(sorted(pairs) if is_there else near if near and random.random() < 0.5 else absent)
    return (
        Question("colour", f"What colour is the {found}?", by_shape[found].colour),
        Question("shape", f"Which shape is {asked}?", by_colour[asked].shape),
        Question("where", f"Where is the {sought}?", PLACES[by_shape[sought].place]),
        Question("count", "How many shapes are there?", NUMERALS[len(shapes)]),
        Question("exist", f"Is there a {colour} {shape}?", "yes" if is_there else "no"),
        Question("number", "What number is shown?", str(number)),
        _ask_relation(random, [by_shape[name] for name in single_shapes]),
    )


def _ask_relation(random: np.random.Generator, shapes: list[Shape]) -> Question:
    """Whether one shape is left of, or above, another, from which it is clearly apart in that direction."""
    # Shapes do not touch, so two of them are apart by 12 pixels at least, hence in one direction by 8.
    choices = [
        (first, second, relation, apart)
        for first in shapes
        for second in shapes
        if first is not second
        for relation, apart in (("left of", second.column - first.column), ("above", second.row - first.row))
    ]
    clear = [choice for choice in choices if abs(choice[3]) >= _CLEAR_APART]
    if not clear:
        clear = [max(choices, key=lambda choice: abs(choice[3]))]
    first, second, relation, apart = clear[int(random.integers(len(clear)))]
    return Question("relation", f"Is the {first.shape} {relation} the {second.shape}?", "yes" if apart > 0 else "no")
