"""A page in Debian's Chromium: what it shows, and that it keeps to its own server."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

    from tests.support.serving import Server

# Those of a container, and none of the services that a browser asks by itself.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What Chromium itself notes of a response with an error's status: what the page makes of it is another matter.
FAILED_REQUEST = "Failed to load resource"
NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


class Playground:
    """The page of a server, watched.

    Args:
        browser: opens it.
        server: serves it.
        options: of the browser's context.
    """

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.server = server
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page: Page = self.context.new_page()
        self.page.add_init_script(NOTE_VIOLATIONS)
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note_request)
        self.page.goto(server.url)

    def _note_message(self, message: ConsoleMessage) -> None:
        if not message.text.startswith(FAILED_REQUEST):
            self.complaints.append(f"{message.type}: {message.text}")

    def _note_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("blob", "data") and f"{address.scheme}://{address.netloc}" != self.server.url:
            self.elsewhere.append(request.url)
        if request.method == "POST":
            self.requests.append(request.post_data_json)

    def close(self) -> None:
        """End, having looked whether anything was wrong."""
        violations = self.page.evaluate("window.violations")
        self.context.close()
        assert (violations, self.complaints, self.elsewhere) == ([], [], [])

    def add(self, *images: bytes, names: tuple[str, ...] = ("a.png", "b.png", "c.png", "d.png")) -> None:
        """Choose files."""
        files = [
            {"name": name, "mimeType": "image/png", "buffer": image} for name, image in zip(names, images, strict=False)
        ]
        before = self.page.locator("#strip li").count()
        self.page.set_input_files("#file", files)
        self.page.wait_for_selector(f"#strip li:nth-child({before + len(images)})", state="attached")

    def ask(self, question: str, *, waits: bool = True) -> str:
        """Ask, and the words of the answer, or those of the error."""
        before = self.page.locator(".turn:not(.failed)").count()
        self.page.fill("#question", question)
        self.page.click("#send")
        if not waits:
            return ""
        self.page.wait_for_selector(f".turn:nth-child({before + 1}):not(.running)")
        return self.answer

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.page.locator(".turn").last.locator(".words").inner_text()

    @property
    def error(self) -> str:
        """The last error."""
        return self.page.locator(".turn .error").last.inner_text()

    def set_stage(self, stage: str) -> None:
        """Move the slider with the keyboard."""
        self.page.locator("#stage").press("Home")
        for _ in range(("global", "both", "local").index(stage)):
            self.page.locator("#stage").press("ArrowRight")

    def pixels(self) -> NDArray[np.uint8]:
        """What is on the canvas."""
        data = self.page.evaluate("document.getElementById('canvas').toDataURL('image/png')")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))

    def colour(self, name: str) -> tuple[int, ...]:
        """A colour of the stylesheet."""
        text = self.page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", name)
        return tuple(bytes.fromhex(text.strip().removeprefix("#")))


def flat_patches(seed: int, rows: int, cols: int, side: int) -> tuple[bytes, NDArray[np.uint8]]:
    """An image of flat patches in bright colours, encoded, and the colours [rows, cols, 3]."""
    random = np.random.default_rng(seed)
    colours = np.stack([random.permutation([250, 120, 20]) for _ in range(rows * cols)]).astype(np.uint8)
    colours = colours.reshape(rows, cols, 3)
    return encoded(Image.fromarray(colours.repeat(side, axis=0).repeat(side, axis=1))), colours


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
