"""Damaged files of strangers: whatever is in them, what comes out is a result or an error of ours."""

from __future__ import annotations

import copy
import io
import json
import random
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.checkpoints import make_tokenizer
from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tiling import Tiler
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp_ops.errors import HivtpError
from tests.runtime.inputs.test_prompt import LLAVA
from tests.runtime.inputs.test_tiling import LLAVA_16

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = 3.0
ODD = [None, True, False, 0, 1, -1, 3, 10**9, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x", "336", "\ud800"]
ODD += [
    10**400,
    -(10**400),
    [10**400] * 3,
    [1e-300] * 3,
    [[10**400, 336]],
    [],
    {},
    [1],
    [[1]],
    [None],
    {"height": 1},
    {"shortest_edge": 10**9},
    [[336, 336]] * 3,
    "a" * 10_000,
    "\0",
]


def seeds() -> Iterator[random.Random]:
    """The same ones each time, as many as there is time for."""
    deadline = time.monotonic() + SECONDS
    seed = 0
    while seed < 20 or time.monotonic() < deadline:
        yield random.Random(seed)
        seed += 1


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy with up to three of its parts exchanged, taken away, or given twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
                holder = holder[key]
                continue
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            break
    return value


def damage(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place, length = rng.randrange(len(content)), rng.choice([1, 1, 1, 2, 4, 16])
        match rng.randrange(5):
            case 0:
                content[place : place + length] = rng.randbytes(length)
            case 1:
                content[place : place + length] = b"\xff" * length
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + length]
            case 4 if rng.random() < 0.2 and len(content) > 20:
                del content[place + 10 :]
    return bytes(content)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_damaged_images(image: Image.Image, file_format: str) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(file, file_format, **({"exif": exif} if file_format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}))
    refused = loaded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rng in seeds():
            try:
                found = load_image(damage(file.getvalue(), rng), max_pixels=100_000)
                ImageProcessor(size=16, crop_size=(16, 16))([found])
                loaded += 1
            except HivtpError:
                refused += 1
    assert refused
    assert loaded


def test_damaged_settings_of_image_processors(image: Image.Image) -> None:
    llava = LLAVA_16 | {"image_processor_type": "LlavaImageProcessor"}
    clip = LLAVA_16 | {"image_processor_type": "CLIPImageProcessor"}
    refused = run = 0
    for rng in seeds():
        try:
            ImageProcessor.from_config(mutate(llava, rng))
            processor = ImageProcessor.from_config(mutate(clip, rng))
            tiler = Tiler.from_config(mutate(LLAVA_16, rng), max_tiles=5)
            # Larger ones than a model takes are refused where the bundle is opened.
            if max(*processor.output_size, tiler.tile_size, *np.ravel(processor.size)) <= 1000:
                processor([image])
                tiler(image)
                run += 1
        except HivtpError:
            refused += 1
    assert refused
    assert run


def test_damaged_prompts() -> None:
    values = {"chat_template": LLAVA, "tokens": {"bos_token": "<s>", "eos_token": "</s>"}, "image_token": "<image>"}
    tokenizer = Tokenizer(make_tokenizer(512).backend_tokenizer)
    messages = [Message("user", [ImagePart(b""), "What </s> is <this>?"])]
    refused = written = 0
    for rng in seeds():
        found = mutate(values, rng)
        if isinstance(found.get("chat_template"), str) and rng.random() < 0.5:
            found["chat_template"] = damage(LLAVA.encode(), rng).decode(errors="replace")
        template = None
        try:
            template = PromptTemplate.from_json(found)
            template.encode(tokenizer, template.render(messages, tokenizer), 511)
            written += 1
        except HivtpError:
            refused += 1
        finally:
            if template is not None:
                template.close()
    assert refused
    assert written


def test_damaged_tokenizers(tmp_path: Path) -> None:
    spec = json.loads(make_tokenizer(320).backend_tokenizer.to_str())
    refused = used = 0
    for rng in seeds():
        (tmp_path / "tokenizer.json").write_text(json.dumps(mutate(spec, rng)))
        try:
            tokenizer = Tokenizer.load(tmp_path)
            literals = tokenizer.literal_tokens("", frozenset(["<image>"]))
            ids = literals.encode(f"<s>{literals.escape('a </s> é <image>')}</s>", add_special_tokens=True)
            stream = tokenizer.stream()
            text = "".join(map(stream.push, ids)) + stream.finish()
            assert text == tokenizer.decode(ids)
            used += 1
        except HivtpError:
            refused += 1
    assert refused
    assert used
