from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.timing.hugging_face import UNPRUNED
from benchmarks.timing.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        run.main(["--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("never_waits")
def test_both_budgets_are_timed_by_hugging_face(
    tiny_checkpoint: Path, tmp_path: Path, measure_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", measure_here)
    # The tower and the language model of transformers run on a CPU too.
    monkeypatch.setattr(run, "DEVICE", "cpu")
    monkeypatch.setattr(run, "PRECISION", "fp32")
    options = Namespace(rounds=1, threads=1)
    tables, found = run.measure_engine(options, Workspace(tmp_path, tiny_checkpoint), "transformers")
    systems = [run.EAGER, UNPRUNED, *run.BUDGETS]
    assert list(found.samples) == systems
    vision, ttft, decode = tables.values()
    assert [row.label for row in vision] == [row.label for row in ttft] == [row.label for row in decode] == systems
    assert vision[0].ratio == ttft[1].ratio == decode[1].ratio == 1
    assert [row.goal for row in vision] == [None, None, None, 0.30]
    assert found.first("preset 192", "num_kept_tokens") == 21


@pytest.mark.gpu
def test_the_kernel_is_timed_on_both_scores() -> None:
    timed = run.measure_kernel(2, 3)
    assert list(timed) == ["random scores", "equal scores"]
    assert all(len(times) == 3 and min(times) > 0 for times in timed.values())
