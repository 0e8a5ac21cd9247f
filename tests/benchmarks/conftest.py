from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.miniature.model import make_model, make_tokenizer, save
from benchmarks.miniature.pictures import HELD_OUT
from benchmarks.timing import harness

if TYPE_CHECKING:
    from pathlib import Path

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
