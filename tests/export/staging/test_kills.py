"""A killed export loses nothing, wherever it was; and the next one cleans up behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("kind", "min_steps"),
    [
        # Nothing at the destination; an empty folder; an old bundle, exchanged in one step; one that is moved away
        # first, where the system cannot exchange.
        ("new", 40),
        ("empty", 45),
        ("exchanged", 70),
        ("moved", 70),
    ],
)
@pytest.mark.parametrize("how", ["steps", "random"])
def test_kills_at_every_step_and_at_100_random_instants(tmp_path: Path, kind: str, min_steps: int, how: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.export.staging.kills", str(tmp_path), kind, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= (min_steps if how == "steps" else 100)
