"""Screenshots of the playground for the docs: the trained miniature, served, and asked in Chromium.

Run as `python -m benchmarks.report.playground`; CONTRIBUTING says what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, draw
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[2] / "docs"
# A picture of six shapes, about which the miniature is right in one conversation.
PICTURE = HELD_OUT[126]
QUESTIONS = ("How many shapes are there?", "What number is shown?")
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu")


@contextlib.contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of a bundle."""
    command = [sys.executable, "-c", "import sys; from hivtp.main import main; sys.exit(main(sys.argv[1:]))"]
    command += ["serve", str(bundle), "--port", "0", "--model-name", "miniature"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(json.loads(line)["urls"][0] for line in process.stderr if '"listening"' in line)
        finally:
            process.terminate()


def take(browser: Any, url: str, options: dict[str, Any], *, is_phone: bool) -> Image.Image:
    """What the page looks like after some questions."""
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.wait_for_selector("#model span")
    file = io.BytesIO()
    draw(PICTURE).image.save(file, "PNG")
    page.set_input_files("#file", {"name": "shapes.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.wait_for_selector("#strip li")
    for number, question in enumerate(QUESTIONS, start=1):
        page.fill("#question", question)
        page.click("#send")
        page.wait_for_selector(f".turn:nth-child({number}):not(.running)")
    if is_phone:
        page.evaluate("scrollTo(0, 0)")
    else:
        page.locator(".figures summary").last.click()
    page.mouse.move(0, 0)
    return Image.open(io.BytesIO(page.screenshot()))


def main() -> None:
    """Write docs/playground.png and docs/playground-phone.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DOCS, help="folder (default: docs)")
    folder = parser.parse_args().output
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as work:
        settings = ExportSettings(preset="288", first_layer=4, num_layers=2)
        bundle = export_bundle(CHECKPOINT, Path(work) / "bundle", settings).folder
        with served(bundle) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
            # The first answer pays for what every later one finds ready.
            take(browser, url, DESK, is_phone=False)
            take(browser, url, DESK, is_phone=False).save(folder / "playground.png", optimize=True)
            phone = take(browser, url, {**PHONE, "device_scale_factor": 2}, is_phone=True)
            phone.save(folder / "playground-phone.png", optimize=True)
            browser.close()


if __name__ == "__main__":
    main()
