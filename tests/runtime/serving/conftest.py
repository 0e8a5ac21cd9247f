from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from tests.support.answers import load
from tests.support.serving import serving
from tests.support.serving_process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp import Pipeline
    from tests.support.serving import Server

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def miniature_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained miniature at half of its tokens."""
    folder = tmp_path_factory.mktemp("miniature") / "bundle"
    settings = ExportSettings(preset="288", first_layer=4, num_layers=2)
    return export_bundle(ROOT / "benchmarks" / "miniature" / "checkpoint", folder, settings, is_quiet=True).folder


@pytest.fixture(scope="session")
def miniature(miniature_bundle: Path) -> Pipeline:
    return load(miniature_bundle)


@pytest.fixture(scope="module")
def server(pruned: Pipeline) -> Iterator[Server]:
    """A server of the tiny model, which all tests of a file share."""
    with serving(pruned.model, model_names=("hivtp",)) as found:
        yield found


@pytest.fixture
def start(pruned_bundle: Path, tmp_path: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def start(*arguments: str) -> Process:
        processes.append(Process(pruned_bundle, tmp_path / f"log{len(processes)}", *arguments))
        return processes[-1]

    yield start
    for found in processes:
        if found.process.poll() is None:
            found.process.kill()
        found.process.wait()
