from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.miniature.layers import PRESETS, LayerRange, layer_scores, rank_layers
from benchmarks.miniature.model import NUM_VISION_LAYERS, make_model
from benchmarks.miniature.pictures import CALIBRATION, draw

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = make_model()
    model.set_attn_implementation("eager")
    return model


def test_the_scores_of_a_layer_are_shares_of_its_attention(model):
    pictures = [draw(seed) for seed in CALIBRATION[:3]]
    scores = layer_scores(model, pictures)
    assert scores.shape == (NUM_VISION_LAYERS, 3, 144)
    assert (scores > 0).all()
    assert (scores.sum(axis=-1) < 1).all(), "the class token has the rest"


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
