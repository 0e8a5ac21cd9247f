from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.scores import BUDGETS, chosen_layers, settings_of
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tests.support.reference import HuggingFace


# Read when torch is imported: threads cost models this small more than they give, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A job in the background of a shell may start with Ctrl-C ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    # At the usual 0.02 the next token of a model this small follows from the last one alone: every picture would
    # get the same answer.
    return make_checkpoint(folder, "tiny", text={"initializer_range": 0.2})


@pytest.fixture(scope="session")
def make_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports the tiny checkpoint with these settings."""

    def make(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("exported") / "bundle"
        return export_bundle(tiny_checkpoint, folder, ExportSettings(**settings), is_quiet=True).folder

    return make


@pytest.fixture(scope="session")
def pruned_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(preset="paper")


@pytest.fixture(scope="session")
def unpruned_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(is_pruned=False)


@pytest.fixture(scope="session")
def exact_bundle(make_bundle: Callable[..., Path]) -> Path:
    """Preset 192, which keeps 21 of 8 x 8 patches, whatever the picture."""
    return make_bundle(preset="192")


@pytest.fixture(scope="session")
def varying_bundle(make_bundle: Callable[..., Path]) -> Path:
    """A rule whose count depends on the picture: 52 to 64 of 8 x 8 patches."""
    return make_bundle(spec=PruningSpec(global_ratio=0.75))


@pytest.fixture(scope="session")
def half_bundle(make_bundle: Callable[..., Path]) -> Path:
    """As `pruned_bundle`, with a decoder in float16."""
    return make_bundle(preset="paper", language_precision="fp16")


@pytest.fixture(scope="session")
def int4_bundle(make_bundle: Callable[..., Path]) -> Path:
    """As `pruned_bundle`, with a decoder in int4."""
    return make_bundle(preset="paper", language_precision="int4")


@pytest.fixture(scope="session")
def prefill_bundle(make_bundle: Callable[..., Path]) -> Path:
    """As `unpruned_bundle`, with a second decoder for prompts."""
    return make_bundle(is_pruned=False, prefill_precision="w8a8")


@pytest.fixture(scope="session")
def fp8_bundle(make_bundle: Callable[..., Path], photo: Path) -> Path:
    """As `exact_bundle`, with a vision graph in fp8 after the scoring layers."""
    return make_bundle(preset="192", vision_precision="fp8", calibration=(photo,))


@pytest.fixture(scope="session")
def bare_bundle(make_bundle: Callable[..., Path]) -> Path:
    """As `pruned_bundle`, without a decoder."""
    return make_bundle(preset="paper", language_precision="none")


@pytest.fixture(scope="session")
def miniature_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained miniature as `make demo` exports it at half of its tokens: its answers are known."""
    settings = settings_of(BUDGETS["50 %"], chosen_layers())
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("miniature") / "bundle", settings, is_quiet=True).folder


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of the real photographs that scikit-image ships."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="session")
def photo(photos: Path) -> Path:
    return photos / "astronaut.png"


@pytest.fixture(scope="session")
def hugging_face(tiny_checkpoint: Path) -> HuggingFace:
    """transformers on the tiny checkpoint."""
    from tests.support.reference import HuggingFace

    return HuggingFace(tiny_checkpoint)
