"""Arguments of requests: good ones, and what callers hand in by mistake."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hivtp import ImagePart, Message, Request, SamplingParams
from tests.fuzz.mutations import any_value, changed_number

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from random import Random

PICTURE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)
FEW = SamplingParams(max_new_tokens=2)
# The marks of the placeholders that stand for special tokens in a user's text.
PRIVATE = "\ue0000\ue001"
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
WITH_EXIF = ("PNG", "JPEG", "WEBP", "TIFF")


@functools.cache
def encoded_images() -> dict[str, bytes]:
    """PICTURE in every format, turned by its EXIF where the format has it."""
    tags = Image.Exif()
    tags[0x0112] = 6
    found = {}
    for name in FORMATS:
        file = io.BytesIO()
        Image.fromarray(PICTURE).save(file, name, **({"exif": tags} if name in WITH_EXIF else {}))
        found[name] = file.getvalue()
    return found


def any_image(folder: Path, random: Random) -> Any:
    shape = tuple(random.choice([0, 1, 2, 3, 4, 5, 33, 500]) for _ in range(random.choice([1, 2, 3, 3, 3, 4])))
    modes = ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA", "I;16", "HSV", "LAB", "YCbCr", "PA", "RGBa")
    released = memoryview(bytearray(b"x"))
    released.release()
    image = Image.new(random.choice(modes), (random.choice([1, 2, 9, 2000]), random.choice([1, 2, 9, 2000])))
    if random.random() < 0.3:
        image.info = random.choice([{"transparency": any_value(random)}, {"exif": b"x"}, {1: 2}, {"exif": 3}])
    return random.choice(
        [
            PICTURE,
            PICTURE[::-1, ::2],
            np.zeros(shape, random.choice(["u1", "f4", "i8", "?", "O", "u2"])),
            np.broadcast_to(np.uint8(3), (30_000, 30_000, 3)),
            image,
            encoded_images()["PNG"],
            bytearray(encoded_images()["GIF"]),
            memoryview(encoded_images()["BMP"]),
            released,
            memoryview(np.zeros((3, 3)))[::2],
            folder,
            folder / "none",
            "/dev/zero",
            "https://example.org/x.png",
            "data:image/png;base64,xx",
            any_value(random),
        ]
    )


def any_text(random: Random) -> Any:
    words = [
        "what",
        "<image>",
        "</s>",
        "<s>",
        "<unk>",
        " ",
        "\n",
        "\0",
        "\u202e",
        "é",
        "\U0001f600",
        "{{ x }}",
        PRIVATE,
    ]
    if random.random() < 0.1:
        return any_value(random)
    return random.choice(["", " "]).join(random.choices(words, k=random.choice([0, 1, 1, 3, 10, 800])))


def any_sampling(random: Random) -> Any:
    """Settings of which one, at most, is rarely what was meant."""
    settings: dict[str, Any] = {"max_new_tokens": random.choice([1, 2, 5, 10**9])}
    good = {
        "temperature": [0, 0.5, 1e-300, 1e300],
        "top_p": [1, 0.5, 1e-9],
        "top_k": [0, 1, 7, 10**9],
        "seed": [0, 2**63],
    }
    good |= {"repetition_penalty": [1, 0.5, 1e300, 1e-300], "logprobs": [0, 20], "ignores_eos": [True, False]}
    good |= {"stop": ["x", ["a", "\n"], "\ufffd"]}
    for name, values in good.items():
        if random.random() < 0.3:
            settings[name] = random.choice(values)
    if random.random() < 0.3:
        name = random.choice(list(good))
        numbers = [10**400, -1, True, np.float32(0.7), np.int64(3), *settings.values()]
        settings[name] = random.choice(
            [any_value(random), changed_number(random.choice([0.5, 1, 2]), random), *numbers]
        )
    return any_value(random) if random.random() < 0.03 else SamplingParams(**settings)


def any_list(random: Random, items: Iterable[Any]) -> Any:
    return random.choice([list, list, list, tuple, iter])(items) if random.random() < 0.95 else any_value(random)


def any_message(folder: Path, random: Random) -> Any:
    if random.random() < 0.05:
        return any_value(random)
    role: Any = random.choice(["user", "user", "assistant", "system"])
    kinds = [lambda: any_text(random), lambda: ImagePart(any_image(folder, random)), lambda: any_value(random), str]
    parts = ["words", *(random.choice(kinds)() for _ in range(random.choice([0, 1, 3])))]
    return Message(role, any_list(random, parts), random.choice([False, True]))


def any_request(folder: Path, random: Random) -> Request:
    """A good request in which some arguments are rarely what was meant."""
    odd = {name for name in ("prompt", "images", "sampling", "system", "history", "has_marks") if random.random() < 0.3}
    arguments: dict[str, Any] = {"prompt": "what", "images": [PICTURE], "sampling": FEW}
    if "prompt" in odd:
        arguments["prompt"] = any_message(folder, random) if random.random() < 0.3 else any_text(random)
    if "images" in odd:
        arguments["images"] = any_list(random, [any_image(folder, random) for _ in range(random.choice([0, 1, 1, 2]))])
    if "sampling" in odd:
        arguments["sampling"] = any_sampling(random)
    if "system" in odd:
        arguments["system"] = any_text(random)
    if "history" in odd:
        arguments["history"] = any_list(random, [any_message(folder, random) for _ in range(random.choice([1, 2, 4]))])
    if "has_marks" in odd:
        arguments["has_marks"] = random.choice([True, False, None, 0])
    return Request(**arguments)
