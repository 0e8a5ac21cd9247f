from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.gpu import kernel
from benchmarks.gpu.kernel import Timing, table
from hivtp_ops import PRESETS, select

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernel.main(["--output", str(tmp_path / "kernel.json")])
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_table_shows_medians_and_whether_the_goal_is_met() -> None:
    lines = table(
        [
            Timing("kernel, random scores", 1, [7.0, 9.0, 8.0], [30.0], goal_us=10.0),
            Timing("kernel, random scores", 64, [21.0], [30.0], goal_us=20.0),
            Timing("operators, random scores", 64, [500.0], [300.0]),
        ]
    ).splitlines()
    assert lines[1].split() == ["kernel,", "random", "scores", "1", "8.00", "7.00", "9.00", "30.0", "10.0", "met"]
    assert lines[2].endswith("20.0  missed")
    assert lines[3].endswith("300.0")


@pytest.mark.parametrize("name", PRESETS)
def test_both_systems_are_the_op(name: str) -> None:
    spec = PRESETS[name]
    for scores in kernel.maps(2).values():
        expected = select(scores, kernel.GRID, spec)
        for system in kernel.systems(spec).values():
            indices, counts = system(torch.from_numpy(scores))
            assert np.array_equal(indices.numpy(), expected.indices)
            assert np.array_equal(counts.numpy(), expected.counts)


@pytest.mark.gpu
def test_benchmark_runs_and_writes_every_sample(tmp_path: Path) -> None:
    output = tmp_path / "kernel.json"
    kernel.main(["--tiles", "2", "--rounds", "3", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["environment"]["gpu"] == torch.cuda.get_device_name()
    assert len(written["timings"]) == 4
    assert all(len(timing["device_us"]) == len(timing["host_us"]) == 3 for timing in written["timings"])
