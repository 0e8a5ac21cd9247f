"""Images that come in, by each way, and those that the server does not take: handled with words."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, features

from tests.support.browser import encoded
from tests.support.serving import random_image, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivtp import Pipeline
    from tests.support.browser import Playground
    from tests.support.serving import Server

pytestmark = pytest.mark.browser

# A file of the page's own making, given to what users give files to.
GIVE = """([kind, name, content, target]) => {
  const file = new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name);
  const data = new DataTransfer();
  data.items.add(file);
  const options = { bubbles: true, cancelable: true };
  const place = document.querySelector(target);
  if (kind === "paste") return place.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: data }));
  for (const type of ["dragenter", "dragover", "drop"]) {
    place.dispatchEvent(new DragEvent(type, { ...options, dataTransfer: data }));
  }
}"""


def give(playground: Playground, kind: str, content: bytes, name: str = "given.png", target: str = "body") -> None:
    playground.page.evaluate(GIVE, [kind, name, base64.b64encode(content).decode(), target])


def notes(playground: Playground) -> list[str]:
    playground.page.wait_for_selector("#notices .note")
    return [note.inner_text().split("\n")[0] for note in playground.page.locator("#notices .note").all()]


def try_to_add(playground: Playground, content: bytes, name: str) -> None:
    playground.page.set_input_files("#file", [{"name": name, "mimeType": "", "buffer": content}])


@pytest.mark.parametrize(
    ("kind", "target"), [("paste", "body"), ("paste", "#question"), ("drop", "body"), ("drop", "#empty")]
)
def test_an_image_comes_in_by_each_way(talker: Server, open_page: Callable[..., Playground], kind: str, target: str):
    playground = open_page(talker)
    give(playground, kind, random_image(1), target=target)
    playground.page.wait_for_selector("#strip li")
    assert playground.page.get_by_role("button", name="Image 1, given.png").count() == 1
    assert "dropping" not in (playground.page.locator("body").get_attribute("class") or "")
    assert playground.page.evaluate("document.activeElement.id") == "question"
    playground.page.get_by_role("button", name="Remove given.png").click()
    assert playground.page.locator("#empty").is_visible()
    assert playground.page.evaluate("document.activeElement.id") == "choose"


def test_pasted_words_are_words(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    script = """() => {
      const data = new DataTransfer();
      data.setData("text/plain", "what is it");
      const event = new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData: data });
      return document.querySelector("#question").dispatchEvent(event);
    }"""
    assert playground.page.evaluate(script)
    assert playground.page.locator("#strip li").count() == 0


def test_a_link_is_not_an_image(talker: Server, open_page: Callable[..., Playground]):
    playground = open_page(talker)
    script = """() => {
      const data = new DataTransfer();
      data.setData("text/uri-list", "https://example.org/a.png");
      document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data }));
    }"""
    playground.page.evaluate(script)
    [note] = notes(playground)
    assert "loads nothing from elsewhere" in note
    playground.page.get_by_role("button", name="Dismiss").click()
    assert playground.page.locator("#notices .note").count() == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_each_format_that_the_server_takes(talker: Server, open_page: Callable[..., Playground], form: str):
    playground = open_page(talker)
    # The bytes say what it is, whatever it is called.
    playground.add(random_image(2, form=form), names=("picture.dat",))
    playground.page.locator("#settings summary").click()
    playground.page.fill("#max_tokens", "2")
    playground.ask("what is it")
    assert playground.page.locator(".error").count() == 0
    assert playground.page.locator("#tokens").is_visible()


@pytest.mark.parametrize("form", ["AVIF", "SVG"])
def test_what_a_browser_shows_and_the_server_does_not_take(
    talker: Server, open_page: Callable[..., Playground], form: str
):
    if form == "SVG":
        size = 'width="60" height="40"'
        content = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect {size} fill="#0f0"/></svg>'.encode()
    else:
        assert features.check("avif")
        content = encoded(Image.new("RGB", (60, 40), (0, 255, 0)), "AVIF")
    playground = open_page(talker)
    try_to_add(playground, content, f"drawing.{form.lower()}")
    [note] = notes(playground)
    assert note == f"drawing.{form.lower()} is {form}; the server takes JPEG, PNG, WEBP, GIF, BMP."
    playground.page.get_by_role("button", name="Convert it to JPEG").click()
    playground.page.wait_for_selector("#strip li")
    assert playground.page.locator("#notices .note").count() == 0
    middle = playground.pixels()[10, 10].astype(int)
    assert (np.abs(middle - (0, 255, 0)) < 12).all()
    playground.page.locator("#settings summary").click()
    playground.page.fill("#max_tokens", "2")
    playground.ask("what is it")
    assert playground.page.locator("#tokens").is_visible()
    [part, _] = playground.requests[-1]["messages"][0]["content"]
    assert base64.b64decode(part["image_url"]["url"].partition(",")[2]).startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("content", [b"some words", random_image(3)[:20], b"%PDF-1.7"], ids=["text", "damaged", "pdf"])
def test_what_is_no_image(talker: Server, open_page: Callable[..., Playground], content: bytes):
    playground = open_page(talker)
    try_to_add(playground, content, "file.png")
    assert notes(playground) == ["file.png is not an image that this browser can show, or it is damaged."]
    assert playground.page.locator("#empty").is_visible()
    # The next one that is an image takes the words away.
    playground.add(random_image(4))
    assert playground.page.locator("#notices .note").count() == 0


def test_too_many_pixels_and_bytes(endless: Pipeline, open_page: Callable[..., Playground]):
    with serving(endless.model, max_image_pixels=20_000, max_image_bytes=30_000, max_tokens=2) as server:
        playground = open_page(server)
        try_to_add(playground, random_image(5, 300, 200), "large.png")
        assert notes(playground) == ["large.png has 300 × 200 pixels, 0.1 megapixels; the server takes 0 megapixels."]
        playground.page.get_by_role("button", name="Scale it down").click()
        playground.page.wait_for_selector("#strip li")
        noise = np.random.default_rng(0).integers(0, 256, (130, 130, 3), np.uint8)
        content = encoded(Image.fromarray(noise))
        assert len(content) > 30_000
        try_to_add(playground, content, "heavy.png")
        [note] = notes(playground)
        assert note == f"heavy.png has {len(content) / 1024:.1f} KiB; the server takes 29.3 KiB."
        playground.page.get_by_role("button", name="Make it smaller").click()
        playground.page.wait_for_selector("#strip li:nth-child(2)")
        playground.ask("what is it")
        assert playground.page.locator(".error").count() == 0
        sizes = playground.page.locator("#strip .thumb").all()
        assert len(sizes) == 2


def test_no_more_images_than_the_server_takes(endless: Pipeline, open_page: Callable[..., Playground]):
    with serving(endless.model, max_images=2, max_tokens=2) as server:
        playground = open_page(server)
        files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": random_image(n)} for n in range(3)]
        playground.page.set_input_files("#file", files)
        [note] = notes(playground)
        assert note.startswith("2.png was not added: the server takes 2 images in one conversation.")
        assert playground.page.locator("#strip li").count() == 2
        playground.ask("what is it")
        assert playground.page.locator(".error").count() == 0
