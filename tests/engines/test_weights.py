from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from benchmarks.checkpoints import make_checkpoint
from hivtp.runtime.weight_files import locate_weights
from hivtp.runtime.weights import CheckpointWeights

if TYPE_CHECKING:
    from pathlib import Path


def opened(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(folder, locate_weights(folder))


def test_other_weights_give_another_fingerprint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = opened(tiny_checkpoint).fingerprint
    assert opened(shutil.copytree(tiny_checkpoint, tmp_path / "copy")).fingerprint == first
    assert opened(make_checkpoint(tmp_path / "other", seed=1)).fingerprint != first


def test_both_layouts_name_the_same_weights(tmp_path: Path) -> None:
    hub, v5 = (opened(make_checkpoint(tmp_path / layout, layout=layout)) for layout in ("hub", "v5"))
    assert hub.locations.keys() == v5.locations.keys()
    assert {location.name for location in hub.locations.values()} != {
        location.name for location in v5.locations.values()
    }
