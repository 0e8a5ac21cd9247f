"""Images of strangers: every form that clients send, every damage that they come with, and the bounds."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from hivtp.runtime.serving.images.data_uri import decode_data_uri
from hivtp.runtime.serving.images.decode import decode_image, read_size
from hivtp.runtime.serving.protocol.errors import ApiError
from tests.runtime.serving.test_streams import alone
from tests.support.serving import asking, data_uri, random_image, serving

if TYPE_CHECKING:
    from hivtp import Pipeline
    from tests.support.serving import Server

URL = "messages[0].content[1].image_url.url"
PNG = random_image(1)


def plain(content: bytes) -> str:
    return base64.b64encode(content).decode()


def broken_into_lines(text: str) -> str:
    return "\r\n".join(text[start : start + 60] for start in range(0, len(text), 60))


FORMS = {
    "usual": data_uri(PNG),
    "wrong type": data_uri(PNG, "image/jpeg"),
    "no image type": data_uri(PNG, "application/octet-stream"),
    "no type": f"data:;base64,{plain(PNG)}",
    "parameters": f"data:image/png;name=a.png;base64,{plain(PNG)}",
    "capitals": f"DATA:image/PNG;BASE64,{plain(PNG)}",
    "line breaks": f"data:image/png;base64,{broken_into_lines(plain(PNG))}\n",
    "blank after the comma": f"data:image/png;base64, {plain(PNG)}",
    "no padding": f"data:image/png;base64,{plain(PNG).rstrip('=')}",
    "too much padding": f"data:image/png;base64,{plain(PNG)}====",
    "for URLs": f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
    "percent signs": f"data:image/png;base64,{plain(PNG).replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_data_uri_has_many_forms(form: str):
    assert decode_data_uri(FORMS[form], "x", 10**6) == PNG


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("data:image/png,abc", 400),
        ("data:image/png;base64", 400),
        ("data:image/png;base64,", 400),
        ("data:image/png;base64,====", 400),
        ("data:image/png;base64,a", 400),
        ("data:image/png;base64,ab!d", 400),
        ("data:image/png;base64,ab=cd", 400),
        ("data:image/png;base64,äöü", 400),
        (f"data:image/png;base64,{plain(b'x' * 101)}", 413),
        (f"data:image/png;base64,{'A' * 5000}", 413),
    ],
)
def test_a_damaged_data_uri_is_refused(uri: str, status: int):
    with pytest.raises(ApiError) as caught:
        decode_data_uri(uri, "there", 100)
    assert (caught.value.status, caught.value.param) == (status, "there")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "../photo.png",
        "photo.png",
        plain(PNG),
        "ftp://example.org/a.png",
        "http://example.org/a.png",
        "https://169.254.169.254/latest/meta-data",
        "javascript:alert(1)",
        "data:text/plain,hello",
    ],
)
def test_no_string_of_a_client_becomes_a_path_or_an_address(server: Server, url: str):
    response = server.chat(asking("what", url))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, URL)
    # It says what to send in its place.
    assert "data:image/" in error["message"]


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises this many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


JPEG = random_image(2, 200, 200, "JPEG")
BAD = {
    "bomb": png_that_claims(20_000, 20_000),
    "huge bomb": png_that_claims(60_000, 60_000),
    "just too large": png_that_claims(5001, 5000),
    "one pixel": random_image(3, 1, 1),
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": PNG[:60],
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "words": b"this is no image",
    "PDF": b"%PDF-1.4\n",
    "TIFF": encoded(Image.new("RGB", (9, 9)), "TIFF"),
    "PPM": encoded(Image.new("RGB", (9, 9)), "PPM"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "long and thin": png_that_claims(2, 12_000_000),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_refused_by_name(server: Server, kind: str):
    response = server.chat(asking("what", BAD[kind]))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, URL), response.text
    assert error["code"] in ("invalid_image", "image_too_large")


def test_of_several_images_the_bad_one_is_named(server: Server):
    response = server.chat(asking("what", PNG, BAD["words"], PNG))
    assert response.json()["error"]["param"] == "messages[0].content[2].image_url.url"


def test_random_bytes_are_refused(server: Server):
    random = np.random.default_rng(0)
    for seed in range(40):
        content = bytearray(random_image(seed, form="PNG" if seed % 2 else "JPEG"))
        for place in random.integers(0, len(content), 12):
            content[place] = random.integers(0, 256)
        assert server.chat(asking("what", bytes(content)), max_tokens=1).status_code in (200, 400)
    server.wait_until_idle()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_formats_that_people_send_are_read(server: Server, pruned: Pipeline, form: str):
    image = random_image(7, form=form)
    assert server.answer(asking("what is it", image)) == alone(pruned, "what is it", [image], max_tokens=8).text


def test_an_animation_gives_its_first_frame_and_a_turned_photo_is_upright():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(animation, "x", 10**6).getpixel((5, 5))[0] > 200
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode_image(turned, "x", 10**6).size == (10, 20)
    assert read_size(turned, "x", 10**6) == (20, 10)
    assert read_size(encoded(Image.new("RGB", (20, 10)), "JPEG"), "x", 10**6) == (10, 20)


def test_the_bounds_of_images_are_settings(pruned: Pipeline):
    with serving(pruned.model, max_images=1, max_image_bytes=2000, max_image_pixels=5000) as server:
        assert server.chat(asking("what", PNG)).status_code == 200
        assert server.chat(asking("what", PNG, PNG)).json()["error"]["code"] == "too_many_images"
        assert server.chat(asking("what", random_image(1, 64, 79))).json()["error"]["code"] == "image_too_large"
        large = server.chat(asking("what", random_image(1, 60, 60, "BMP")))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "image_too_large")


def test_an_image_alone_is_a_question(server: Server):
    assert server.chat([{"type": "image_url", "image_url": {"url": data_uri(PNG)}}]).status_code == 200


def test_an_image_seen_before_costs_no_vision_time(server: Server):
    image = random_image(8)
    server.chat(asking("what", image))
    hits = server.metric("mm_cache_hits_total")
    server.chat(asking("how many", image))
    assert server.metric("mm_cache_hits_total") == hits + 1
