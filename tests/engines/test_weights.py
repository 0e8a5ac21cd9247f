from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.runtime.weights import CheckpointWeights, canonical_name, locate_weights

if TYPE_CHECKING:
    from pathlib import Path


def opened(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(folder, locate_weights(folder))


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", "vision.encoder.layers.3.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.3.mlp.fc1.bias", "vision.encoder.layers.3.mlp.fc1.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.weight", "vision.pre_layrnorm.weight"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language.model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "language.lm_head.weight"),
        ("model.language_model.norm.weight", "language.model.norm.weight"),
        ("lm_head.weight", "language.lm_head.weight"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("something.else", None),
    ],
)
def test_names_of_every_published_layout_are_known(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


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
