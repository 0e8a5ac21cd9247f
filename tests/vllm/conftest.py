"""Tests that need vLLM, in an environment of their own: `make vllm` makes it and runs them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.timing.vllm_server import ROOT, environment, overrides

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.family import Family

# vLLM's attention on a CPU takes heads of 32 numbers and more.
TEXT = {
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_family(folder: Path, name: str) -> Family:
    from benchmarks.checkpoints import make_checkpoint, model_class
    from tests.support.family import Family

    # Of the two image processors of transformers vLLM takes this one.
    return Family(make_checkpoint(folder, "tiny", family=name, text=TEXT), model_class(name), "torchvision")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llava") / "checkpoint", "llava")


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("next") / "checkpoint", "llava_next")


def engine_settings(folder: Path, pruning: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Arguments of `LLM`; no pruning is vLLM's own architecture."""
    return {
        "model": str(folder),
        "hf_overrides": overrides(folder, pruning),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "limit_mm_per_prompt": {"image": 3},
        "enable_mm_embeds": True,
        **settings,
    }


# The same on the command line of a server.
ARGUMENTS = ("--max-model-len", "1024", "--limit-mm-per-prompt", '{"image": 3}', "--enable-mm-embeds")


def start_engine(
    settings: dict[str, Any], batches: Any, num_new: int, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run an engine to its end; what it answers is in `folder / "answers"`."""
    command = [sys.executable, "-m", "tests.vllm.engine", str(folder / "answers")]
    done = subprocess.run(
        command,
        input=pickle.dumps((settings, batches, num_new)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment(),
        timeout=900,
        check=False,
    )
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(errors="replace"))


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Answers batches of prompts in an engine of its own; see `tests.vllm.engine`."""

    def run(settings: dict[str, Any], batches: Any, num_new: int = 8) -> list[list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("engine")
        done = start_engine(settings, batches, num_new, folder)
        assert done.returncode == 0, done.stdout[-6000:]
        found: list[list[dict[str, Any]]] = pickle.loads((folder / "answers").read_bytes())
        return found

    return run
