from __future__ import annotations

import re

import pytest

from hivtp.runtime.integrations.vllm.settings import PluginSettings
from hivtp_ops import PruningSpec
from hivtp_ops.errors import HivtpError
from tests.runtime.integrations.vllm.configs import llava, llava_next, tower


def test_a_preset_is_fitted_to_the_grid_and_its_layers_to_the_tower():
    settings = PluginSettings.from_config(llava({"preset": "192"}))
    assert settings.spec == PruningSpec.preset("192").resolve(24)
    assert (settings.spec.keep, settings.spec.first_layer, settings.spec.num_layers) == (192, 6, 3)
    assert (settings.grid, settings.tile_size, settings.pinpoints) == ((24, 24), 336, None)
    assert (settings.feature_layers, settings.num_prefix_tokens) == ((23,), 0)

    small = tower(num_hidden_layers=6, image_size=64, patch_size=8)
    assert PluginSettings.from_config(llava({"preset": "192"}, vision_config=small)).spec.keep == 21


def test_each_setting_may_be_given():
    given = {"preset": "288", "first_layer": 4, "num_layers": 2, "keep": 100, "regions": 3, "window": 4}
    spec = PluginSettings.from_config(llava({**given, "global_ratio": 0.1})).spec
    assert spec == PruningSpec(first_layer=4, num_layers=2, regions=3, global_ratio=0.1, window=4, keep=100)
    # The paper's rule has an exact count where one is set.
    assert PluginSettings.from_config(llava({"keep": 200})).spec == PruningSpec(keep=200).resolve(24)


def test_the_class_token_is_a_feature_where_the_model_says_so():
    config = llava({"preset": "64"}, vision_feature_select_strategy="full")
    assert PluginSettings.from_config(config).num_prefix_tokens == 1


def test_next_has_tiles_and_newlines():
    settings = PluginSettings.from_config(llava_next({"preset": "64"}))
    assert settings.newline == "all"
    assert settings.pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert PluginSettings.from_config(llava_next({"preset": "64", "newline": "none"})).newline == "none"
    assert PluginSettings.from_config(llava_next({"preset": "64"}, vision_feature_layer=[-2, 12])).feature_layers == (
        23,
        12,
    )


def test_no_pruning_is_said_in_so_many_words():
    settings = PluginSettings.from_config(llava({"preset": "none"}))
    assert settings.spec is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llava(None), 'give --hf-overrides .*"hivtp": {"preset": "192"}'),
        (llava("192"), "hivtp must be an object of settings, not '192'"),
        (llava({}), "this rule keeps more of one image than of another"),
        (llava({"preset": "paper"}), r"preset 'paper' keeps more of one image .* exact count \(64, 128, 192, 288\)"),
        (llava({"preset": "200"}), "no preset is named '200'; there are paper, 288, 192, 128, 64"),
        (llava({"preset": 192}), 'preset must be a name, such as "192", not 192'),
        (llava({"preset": ["192"]}), "preset must be a name"),
        (llava({"preset": "none", "keep": 3}), r"keeps every token; leave \['keep'\] out"),
        (llava({"preset": "192", "presets": 1}), r"unknown settings \['presets'\]; there are preset, first_layer"),
        (llava({"preset": "192", "keep": 577}), "keep is 577, more than the 576 patches"),
        (llava({"preset": "192", "keep": 0}), "keep must be a whole number of at least 1"),
        (llava({"preset": "192", "keep": "192"}), "keep must be a whole number"),
        (llava({"preset": "192", "keep": None}), "preset '192' keeps more of one image than of another"),
        (llava({"preset": "192", "first_layer": 23, "num_layers": 2}), "layers 23 to 24 lie outside the encoder"),
        (llava({"preset": "192", "first_layer": 22, "num_layers": 2}), "reach beyond the features.* at most 23"),
        (llava({"preset": "192", "window": 30}), "window is 30, larger than the 24 x 24 grid"),
        (llava({"preset": "192", "newline": "kept-rows"}), "newline must be one of all, none.*follow from its size"),
        (llava({"preset": "192", "newline": 1}), "newline must be one of all, none"),
        (llava({"preset": "192"}, model_type="qwen2_vl"), "this model is a 'qwen2_vl'"),
        (llava({"preset": "192"}, vision_config=tower(model_type="siglip_vision_model")), "needs a clip_vision_model"),
        (llava({"preset": "192"}, vision_feature_select_strategy="class"), "prunes llava with default or full"),
        (llava({"preset": "192"}, vision_feature_layer=[-2, 3]), "takes the features of one layer"),
        (llava_next({"preset": "192"}, vision_feature_select_strategy="full"), "prunes llava_next with default"),
        (llava_next({"preset": "192"}, image_grid_pinpoints=None), "expected a list of sizes"),
        # Of a tower of 4 layers not even the smallest preset's windows fit the grid.
        (llava({"preset": "64"}, vision_config=tower(image_size=42)), "preset '64' does not fit: window is 4"),
    ],
)
def test_what_cannot_work_is_refused_in_words(config, words):
    with pytest.raises(HivtpError) as caught:
        PluginSettings.from_config(config)
    assert re.search(words, str(caught.value)), caught.value
