from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.miniature.model import make_model, make_tokenizer, save
from benchmarks.miniature.pictures import HELD_OUT
from benchmarks.timing import harness
from benchmarks.timing.harness import Results, measure_in_turns
from benchmarks.timing.worker import LocalSystem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.timing.worker import System

NUM_PICTURES = 6


@pytest.fixture(scope="session")
def untrained_miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the miniature's shape whose answers are none, but depend on picture and question."""
    import torch

    model = make_model(seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.dim() == 2:
                weight.mul_(4)
        # Only words are said, and often none.
        tokenizer, head = make_tokenizer(), model.lm_head.weight
        head[[tokenizer.unk_token_id, tokenizer.bos_token_id, model.config.image_token_id]] = 0
        head[len(tokenizer) :] = 0
        head[tokenizer.eos_token_id] *= 2
    folder = tmp_path_factory.mktemp("miniature") / "checkpoint"
    save(model, folder)
    return folder


@pytest.fixture(scope="session")
def evaluation(untrained_miniature: Path) -> Evaluation:
    return Evaluation.open(untrained_miniature, HELD_OUT[:NUM_PICTURES])


@pytest.fixture
def never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run on machines with other work to do.
    monkeypatch.setattr(harness, "MAX_WAIT_S", 0.0)
    monkeypatch.setattr(harness, "PAUSE_S", 0.0)
    monkeypatch.setattr(harness, "MAX_OTHER_CORES", float("inf"))


@pytest.fixture
def measure_here() -> Callable[[Sequence[System], int, int], Results]:
    """As `harness.measure`, in this process, which has imported already what a worker would take seconds to import."""

    def measure(systems: Sequence[System], num_rounds: int, num_threads: int) -> Results:
        opened = [
            LocalSystem(system.name, system.open(num_threads=num_threads, **system.arguments)) for system in systems
        ]
        return measure_in_turns(opened, num_rounds)

    return measure


@pytest.fixture(scope="session")
def int8_bundle(make_bundle: Callable[..., Path]) -> Path:
    """As `exact_bundle`, with vision in int8 and a decoder of int4 weights."""
    return make_bundle(preset="192", vision_precision="int8", language_precision="int4")
