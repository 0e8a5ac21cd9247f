"""How many tokens an image keeps, by its size alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hivtp.runtime.integrations.transformers import prune
from hivtp.runtime.integrations.vllm.counts import count_tokens, layout_of
from hivtp.runtime.integrations.vllm.settings import PluginSettings
from hivtp_ops import PruningSpec
from tests.runtime.integrations.vllm.configs import PINPOINTS, llava, llava_next
from tests.support.family import GRID, SIZES, picture

# (height, width), among them lines of a pixel.
EXTREMES = [(1, 1), (1, 4000), (4000, 1), (3, 2000), (336, 336), (672, 672), (335, 1009), (1008, 336)]


def sizes() -> list[tuple[int, int]]:
    drawn = np.random.default_rng(5).integers(1, 2000, (200, 2)).tolist()
    return [*EXTREMES, *((height, width) for height, width in drawn)]


@pytest.mark.parametrize(("preset", "number"), [("288", 288), ("192", 192), ("128", 128), ("64", 64)])
def test_an_image_of_llava_keeps_the_preset_whatever_its_size(preset, number):
    settings = PluginSettings.from_config(llava({"preset": preset}))
    assert {count_tokens(settings, size) for size in sizes()} == {number}
    with_class = PluginSettings.from_config(llava({"preset": preset}, vision_feature_select_strategy="full"))
    assert count_tokens(with_class, (10, 10)) == number + 1


def test_next_with_every_patch_kept_counts_what_transformers_counts():
    from transformers import LlavaNextProcessor

    # It needs a tokenizer to begin with, and none to count.
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.vision_feature_select_strategy = "default"
    settings = PluginSettings.from_config(llava_next({"keep": 576}))
    for height, width in sizes():
        expected = processor._get_number_of_features(height, width, 336, 336) - 1
        assert count_tokens(settings, (height, width)) == expected, (height, width)


def test_next_keeps_the_preset_of_each_tile_and_a_newline_of_each_row():
    settings = PluginSettings.from_config(llava_next({"preset": "192"}))
    # A base tile and 2 x 2 more without padding: 48 rows of patches.
    assert count_tokens(settings, (672, 672)) == 5 * 192 + 48
    assert count_tokens(settings, (1008, 336)) == 4 * 192 + 72
    none = PluginSettings.from_config(llava_next({"preset": "192", "newline": "none"}))
    assert count_tokens(none, (672, 672)) == 5 * 192


def test_a_tile_that_is_mostly_padding_keeps_what_it_has():
    settings = PluginSettings.from_config(llava_next({"preset": "192"}))
    # 1 x 3 tiles, of which a strip of 48 pixels, 4 rows of patches after rounding, is image.
    layout = layout_of(settings, (40, 840))
    assert (layout.tile_rows, layout.tile_cols) == (1, 3)
    rows = layout.patch_rows((24, 24))
    num_rows = rows.stop - rows.start
    assert num_rows * 24 < 192
    assert count_tokens(settings, (40, 840)) == 192 + 3 * num_rows * 24 + num_rows


def test_no_size_keeps_more_than_a_full_grid_of_tiles():
    settings = PluginSettings.from_config(llava_next({"preset": "192"}))
    # vLLM takes room for the most that a pinpoint gives.
    most = max(count_tokens(settings, (height, width)) for height, width in PINPOINTS)
    assert max(count_tokens(settings, size) for size in sizes()) <= most


@pytest.mark.parametrize("newline", ["all", "none"])
@pytest.mark.parametrize("rule", [{"preset": "192"}, {"preset": "64"}, {"keep": 64}])
def test_next_counts_are_those_of_prune_in_transformers(llava_next, next_model, rule, newline):
    settings = PluginSettings.from_config(_with(next_model.config, {**rule, "newline": newline}))
    spec = PruningSpec.preset(rule["preset"], GRID) if "preset" in rule else PruningSpec(keep=rule["keep"])
    with prune(next_model, spec, newline=newline) as pruned, torch.no_grad():
        for seed, size in enumerate([*SIZES, (61, 67), (500, 7), (9, 300)]):
            image = picture(seed, size)
            inputs = llava_next.inputs("<image>", [image])
            kept = pruned.encode(inputs["pixel_values"], inputs["image_sizes"])
            assert count_tokens(settings, (image.height, image.width)) == len(kept.embeds)


def _with(config, hivtp):
    from copy import deepcopy

    config = deepcopy(config)
    config.hivtp = hivtp
    return config
