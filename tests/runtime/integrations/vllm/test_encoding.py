"""Images through a tower that looks as vLLM's does: kept sets and embeddings are those of `prune` in transformers."""

from __future__ import annotations

import threading
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hivtp.runtime.integrations.transformers import prune
from hivtp.runtime.integrations.vllm.encoding import VllmLayers, encode_images
from hivtp.runtime.integrations.vllm.settings import PluginSettings
from hivtp_ops import PruningSpec
from tests.runtime.integrations.vllm.fake_layers import fake_tower
from tests.support.family import GRID, SIZES, picture


class AllReduce:
    """Sums a tensor over threads that stand for ranks; counts the sums of each."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self._parts: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self.shapes: list[torch.Size] = []

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self._parts.append(part)
        self._barrier.wait()
        total = torch.stack(self._parts).sum(dim=0)
        if self._barrier.wait() == 0:
            self._parts.clear()
            self.shapes.append(part.shape)
        self._barrier.wait()
        return total


def no_sum(_part: torch.Tensor) -> torch.Tensor:
    raise AssertionError("nothing is split here")


def vllm_model(model: Any, tower: Any) -> Any:
    own = model.model
    return SimpleNamespace(
        vision_tower=tower,
        multi_modal_projector=own.multi_modal_projector,
        image_newline=getattr(own, "image_newline", None),
    )


def settings_for(model: Any, hivtp: dict[str, Any]) -> PluginSettings:
    config = deepcopy(model.config)
    config.hivtp = hivtp
    return PluginSettings.from_config(config)


@torch.no_grad()
def test_llava_embeddings_are_those_of_prune(llava):
    model, settings = llava.load(), {}
    for hivtp in ({"preset": "192"}, {"preset": "64", "first_layer": 0, "num_layers": 5}, {"keep": 64}):
        settings = settings_for(model, hivtp)
        pixels = llava.inputs("<image>" * 6, [picture(seed) for seed in range(6)])["pixel_values"]
        spec = PruningSpec.preset(hivtp["preset"], GRID) if "preset" in hivtp else PruningSpec()
        rest = {name: value for name, value in hivtp.items() if name != "preset"}
        with prune(model, PruningSpec(**{**spec.to_dict(), **rest})) as pruned:
            expected = pruned.encode(pixels).embeds
        found = encode_images(
            vllm_model(model, fake_tower(model.model.vision_tower)), settings, VllmLayers(no_sum), pixels, None
        )
        assert [len(image) for image in found] == [settings.spec.keep] * 6
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-6)
        # A list of images is a batch of them.
        again = encode_images(
            vllm_model(model, fake_tower(model.model.vision_tower)), settings, VllmLayers(no_sum), list(pixels), None
        )
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("newline", ["all", "none"])
def test_next_embeddings_are_those_of_prune(llava_next, next_model, newline):
    settings = settings_for(next_model, {"preset": "192", "newline": newline})
    images = [picture(40 + seed, size) for seed, size in enumerate(SIZES)]
    inputs = llava_next.inputs("<image>" * len(images), images)
    with prune(next_model, PruningSpec.preset("192", GRID), newline=newline) as pruned:
        expected = pruned.encode(inputs["pixel_values"], inputs["image_sizes"]).embeds
        alone = [
            pruned.encode(inputs["pixel_values"][index : index + 1], inputs["image_sizes"][index : index + 1]).embeds
            for index in range(len(images))
        ]
    model = vllm_model(next_model, fake_tower(next_model.model.vision_tower))
    found = encode_images(model, settings, VllmLayers(no_sum), inputs["pixel_values"], inputs["image_sizes"])
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-6)
    for image, single in zip(found, alone, strict=True):
        torch.testing.assert_close(image, single, rtol=0, atol=1e-5)


@torch.no_grad()
def test_heads_that_are_split_over_ranks_give_the_same_scores(llava):
    """Three heads on three ranks: every rank keeps what one rank with all heads keeps."""
    model = llava.load()
    settings = settings_for(model, {"preset": "192", "num_layers": 2})
    pixels = llava.inputs("<image>" * 5, [picture(seed) for seed in range(5)])["pixel_values"]
    whole = vllm_model(model, fake_tower(model.model.vision_tower))
    expected = encode_images(whole, settings, VllmLayers(no_sum), pixels, None)

    all_reduce = AllReduce(3)
    found: dict[int, list[torch.Tensor]] = {}

    def run(rank: int) -> None:
        part = vllm_model(model, fake_tower(model.model.vision_tower, rank, 3, all_reduce))
        with torch.no_grad():
            found[rank] = encode_images(part, settings, VllmLayers(all_reduce), pixels, None)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0, 1, 2]
    for images in found.values():
        for image, single in zip(images, expected, strict=True):
            torch.testing.assert_close(image, single, rtol=0, atol=1e-5)
    # Of two layers and two parts of the batch: the scores and the outputs.
    num_scores = [shape for shape in all_reduce.shapes if len(shape) == 2]
    assert [tuple(shape) for shape in num_scores] == [(4, 65), (1, 65)] * 2


@torch.no_grad()
def test_layers_after_the_features_never_run(llava):
    model = llava.load()
    tower = fake_tower(model.model.vision_tower)
    # vLLM does not even load them.
    tower.vision_model.encoder.layers = tower.vision_model.encoder.layers[:5]
    settings = settings_for(model, {"preset": "192"})
    assert settings.feature_layers == (5,)
    pixels = llava.inputs("<image>", [picture(1)])["pixel_values"]
    seen: list[tuple[int, ...]] = []
    projector = model.model.multi_modal_projector

    def project(features: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(features.shape))
        return projector(features)

    own = SimpleNamespace(vision_tower=tower, multi_modal_projector=project)
    [image] = encode_images(own, settings, VllmLayers(no_sum), pixels, None)
    assert len(image) == 21
    # The projector sees what is kept, and no more.
    assert seen == [(21, 48)]


@torch.no_grad()
def test_a_tower_that_overflows_still_gives_as_many_tokens_as_there_is_room_for(llava, llava_next, next_model):
    model = llava.load()
    settings = settings_for(model, {"preset": "192"})
    pixels = llava.inputs("<image>" * 2, [picture(1), picture(2)])["pixel_values"]
    expected = encode_images(
        vllm_model(model, fake_tower(model.model.vision_tower)), settings, VllmLayers(no_sum), pixels, None
    )
    pixels[0] = torch.nan
    found = encode_images(
        vllm_model(model, fake_tower(model.model.vision_tower)), settings, VllmLayers(no_sum), pixels, None
    )
    assert [len(image) for image in found] == [21, 21]
    # The image beside it is not touched.
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)

    inputs = llava_next.inputs("<image>", [picture(3, SIZES[3])])
    model = vllm_model(next_model, fake_tower(next_model.model.vision_tower))
    next_settings = settings_for(next_model, {"preset": "192"})
    arguments = inputs["pixel_values"], inputs["image_sizes"]
    [good] = encode_images(model, next_settings, VllmLayers(no_sum), *arguments)
    [bad] = encode_images(model, next_settings, VllmLayers(no_sum), arguments[0] * torch.nan, arguments[1])
    assert bad.shape == good.shape
