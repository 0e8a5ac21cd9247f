from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.generation import Generation
from tests.support.answers import load, with_language
from tests.support.browser import ARGUMENTS, Playground
from tests.support.serving import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser

    from hivtp import Pipeline
    from tests.support.serving import Server


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=chromium, args=ARGUMENTS)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Playground]]:
    """Opens the page of a server; in the end it must have complained of nothing, and have asked nobody else."""
    opened: list[Playground] = []

    def open_page(server: Server, **options: Any) -> Playground:
        found = Playground(browser, server, **options)
        opened.append(found)
        if not server.service.settings.api_keys:
            found.page.wait_for_selector("#model span")
        return found

    yield open_page
    for found in opened:
        found.close()


@pytest.fixture(scope="package")
def shapes(miniature: Pipeline) -> Iterator[Server]:
    """A server of the trained miniature."""
    with serving(miniature.model, model_names=("miniature",)) as found:
        yield found


@pytest.fixture(scope="package")
def endless(pruned: Pipeline) -> Iterator[Pipeline]:
    """A tiny model whose answers have no end."""
    pipeline = with_language(pruned, eos_token_ids=())
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="package")
def talker(endless: Pipeline) -> Iterator[Server]:
    """A server of it."""
    with serving(endless.model, model_names=("talker",), max_tokens=300) as found:
        yield found


@pytest.fixture(scope="package")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("tiled")
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", text=text)
    pipeline = load(export_bundle(checkpoint, folder / "bundle", ExportSettings(), is_quiet=True).folder)
    with serving(pipeline.model, max_tokens=8) as found:
        yield found
    pipeline.close()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token takes a while."""
    choose = Generation.choose

    def slow(self: Generation, logits: Any) -> int:
        time.sleep(0.03)
        return choose(self, logits)

    monkeypatch.setattr(Generation, "choose", slow)
