from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.timing.hugging_face import PapersWay, StageClock, load, select_by_masks
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (24, 24)])
def test_selecting_by_masks_is_the_rule(grid: tuple[int, int]) -> None:
    scores = np.random.default_rng(0).random((3, grid[0] * grid[1]), dtype=np.float32)
    expected = select(scores, grid, PruningSpec.preset("paper", grid))
    for tile, indices, count in zip(scores, expected.indices, expected.counts, strict=True):
        assert select_by_masks(torch.from_numpy(tile), grid).tolist() == indices[:count].tolist()


def test_the_papers_way_keeps_what_the_rule_keeps(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, 1, tower_attention="eager")
    way = PapersWay(model, StageClock(model))
    side = model.config.vision_config.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, side, side), dtype=np.float32))
    with torch.inference_mode():
        tokens = way.encode(pixels)
        unpruned = model.get_image_features(pixel_values=pixels).pooler_output
    for kept, whole in zip(tokens, unpruned, strict=True):
        assert len(kept) < len(whole)
        # Each is one of the unpruned tokens, in their order.
        nearest = torch.cdist(kept, whole, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        assert nearest.values.max() < 1e-4
        assert nearest.indices.tolist() == sorted(set(nearest.indices.tolist()))


def test_a_clock_times_tower_and_projector_and_starts_anew(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, 1)
    clock = StageClock(model)
    side = model.config.vision_config.image_size
    with torch.inference_mode():
        clock.start("vision_ms")
        model.get_image_features(pixel_values=torch.zeros(1, 3, side, side))
        clock.stop("vision_ms")
    times = clock.take()
    assert set(times) == {"vision_ms", "tower_ms", "projector_ms"}
    assert 0 < times["tower_ms"] + times["projector_ms"] <= times["vision_ms"]
    assert clock.take() == {}
