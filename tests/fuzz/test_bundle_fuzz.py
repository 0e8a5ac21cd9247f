"""Whatever a file or a request holds, it works or raises a HivtpError: soon, in bounded memory, and writing nothing.

HIVTP_FUZZ_SECONDS is how long it runs (20 by default), HIVTP_FUZZ_SEED where it begins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("HIVTP_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("HIVTP_FUZZ_SEED", "0"))
# To start, and to end the last case.
SPARE_SECONDS = 120


@pytest.fixture(scope="module")
def next_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", text={"initializer_range": 0.2})
    return export_bundle(checkpoint, folder / "bundle", ExportSettings(keep_total=40), is_quiet=True).folder


def test_nothing_but_a_hivtp_error_comes_of_damage(pruned_bundle: Path, next_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fuzz"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.fuzz.worker", folder, SEED, SECONDS, pruned_bundle, next_bundle]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        **dict.fromkeys(("HOME", "TMPDIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"), str(folder)),
    }
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS + SPARE_SECONDS,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-6000:]}"
    results = json.loads(done.stdout)
    for kind, counts in results.items():
        # All kinds of damage were done, and some of each was found.
        assert sum(counts.values()) - counts.get("works", 0) > 0, (kind, counts)
    # Some of it does no harm.
    assert sum(counts.get("works", 0) for counts in results.values()) > 5, results
