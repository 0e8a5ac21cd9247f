"""What clients ask: words and images in a fixed mix, drawn from a seed, at times of a Poisson clock."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

QUESTIONS = (
    "What is in the picture on the left of the house, and how many people are there in the small red car above it?",
    "What is in the picture?",
    "How many people are there in front of the house?",
    "Describe the car.",
)
# Of ten requests: about an image of its own, about one that was sent before, and about none.
NUM_NEW, NUM_SEEN, NUM_TEXT = 5, 2, 3
# Tokens of an answer. The eos token is ignored, so that all servers decode the same number.
LENGTHS = (8, 16, 32, 48)
# Width and height.
IMAGE_SIZE = (640, 480)
SHARE_STREAMED = 0.8


class Traffic:
    """Requests that can be repeated: the same seed gives the same ones.

    Args:
        seed: of all that is drawn; images of another seed are others.
        image_size: width and height.
    """

    def __init__(self, seed: int, image_size: tuple[int, int] = IMAGE_SIZE) -> None:
        self._choose = random.Random(seed)
        self._seed = seed
        self._image_size = image_size
        self._num_images = 0
        self._seen: list[str] = []

    def request(self) -> bytes:
        """The body of the next request."""
        place = self._choose.randrange(NUM_NEW + NUM_SEEN + NUM_TEXT)
        content: Any = self._choose.choice(QUESTIONS)
        if place < NUM_NEW or (place < NUM_NEW + NUM_SEEN and not self._seen):
            content = [{"type": "text", "text": content}, _image_part(self._new_image())]
        elif place < NUM_NEW + NUM_SEEN:
            content = [{"type": "text", "text": content}, _image_part(self._choose.choice(self._seen))]
        return body(content, self._choose.choice(LENGTHS), streams=self._choose.random() < SHARE_STREAMED)

    def image_request(self, num_tokens: int) -> bytes:
        """A request about a new image."""
        return body([{"type": "text", "text": QUESTIONS[1]}, _image_part(self._new_image())], num_tokens, streams=False)

    def _new_image(self) -> str:
        self._num_images += 1
        uri = _drawn_image(self._seed * 1_000_003 + self._num_images, self._image_size)
        # The last few: as a chat sends its images again with each turn.
        self._seen = [*self._seen[-7:], uri]
        return uri


def body(content: Any, num_tokens: int, *, streams: bool) -> bytes:
    """A request with one question."""
    return json.dumps(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": streams,
        }
    ).encode()


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """When requests come, in seconds from the start: at random, independent of each other and of the answers.

    Args:
        rate: requests per second, in the mean.
        seconds: when the last one has come.
        seed: of the clock.
    """
    clock = random.Random(seed)
    now = clock.expovariate(rate)
    while now < seconds:
        yield now
        now += clock.expovariate(rate)


def _image_part(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


def _drawn_image(seed: int, size: tuple[int, int]) -> str:
    """A JPEG of coloured blobs as a data: URI."""
    from PIL import Image

    blobs = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blobs).resize(size).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
