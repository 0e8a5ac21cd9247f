from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hivtp import LanguageOptions, Pipeline
from tests.support.answers import load
from tests.support.fake_vllm import FakeVllm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def exact(exact_bundle: Path) -> Pipeline:
    """Decodes here what the server decodes, too."""
    return load(exact_bundle)


@pytest.fixture
def fake(exact: Pipeline) -> Iterator[FakeVllm]:
    server = FakeVllm(exact.model)
    yield server
    server.close()


@pytest.fixture
def open_remote(fake: FakeVllm, exact_bundle: Path) -> Iterator[Callable[..., Pipeline]]:
    """Opens a bundle whose language model is the server."""
    opened: list[Pipeline] = []

    def open_it(bundle: Path = exact_bundle, **options: Any) -> Pipeline:
        language = LanguageOptions("vllm", **{"url": fake.url, "max_silence": 20.0, **options})
        opened.append(Pipeline.load(bundle, language=language))
        fake.chats.clear()
        return opened[-1]

    yield open_it
    for pipeline in opened:
        pipeline.close()


@pytest.fixture
def remote(open_remote: Callable[..., Pipeline]) -> Pipeline:
    return open_remote()
