from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.miniature.layers import PRESETS, LayerRange, foreground_share, rank_layers
from benchmarks.miniature.model import make_model
from benchmarks.miniature.pictures import CALIBRATION, draw

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = make_model()
    model.set_attn_implementation("eager")
    return model


def test_what_is_kept_of_the_foreground_counts_by_what_could_be_kept():
    is_foreground = np.array([[True, True, True, False], [True, False, False, False]])
    # Two of two that could be kept, and none of one.
    assert foreground_share(is_foreground, np.array([[0, 2], [1, 3]])) == pytest.approx(2 / 3)


def test_every_range_is_ranked_once_and_the_best_comes_first(model):
    ranked = rank_layers(model, [draw(seed) for seed in CALIBRATION[:3]])
    assert len({(layers.first_layer, layers.num_layers) for layers in ranked}) == len(ranked) == 6 + 5 + 4
    worths = [layers.worth for layers in ranked]
    assert worths == sorted(worths, reverse=True)
    assert all(0 <= share <= 1 for layers in ranked for share in layers.foreground_kept.values())


def test_a_preset_is_fitted_with_the_layers():
    layers = LayerRange(3, 2, 1.0, {})
    specs = [layers.fit(preset) for preset in PRESETS]
    assert [(spec.first_layer, spec.num_layers) for spec in specs] == [(3, 2)] * 3
    assert [spec.keep for spec in specs] == [72, 32, 16]
