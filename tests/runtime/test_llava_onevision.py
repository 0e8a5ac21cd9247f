"""LLaVA-OneVision through the whole pipeline, and pruned in transformers, against plain means."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hivtp import Message
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.messages import ImagePart
from hivtp.runtime.integrations.transformers import prune
from hivtp.runtime.vision.interpolation import interpolated
from hivtp_ops import PruningSpec
from hivtp_ops.errors import PromptError, SettingsError
from tests.support.answers import ask, at_most, load
from tests.support.onevision import NUM_NEW, SIZES, OneVision

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from hivtp import Pipeline

PROMPT = "What is in the picture?"
EXACT = PruningSpec.preset("192", (8, 8))


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> OneVision:
    return OneVision(tmp_path_factory.mktemp("onevision") / "checkpoint")


@pytest.fixture(scope="module")
def make(onevision: OneVision, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def export(**settings: Any) -> Pipeline:
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        return load(export_bundle(onevision.folder, folder, ExportSettings(**settings), is_quiet=True).folder)

    return export


@pytest.fixture(scope="module")
def unpruned(make: Any) -> Pipeline:
    return make(is_pruned=False)


@pytest.fixture(scope="module")
def budgeted(make: Any) -> Pipeline:
    return make(keep_total=200, newline="none")


def picture(photos: Path, size: tuple[int, int], name: str = "coffee.png") -> Image.Image:
    return load_image(photos / name).resize(size)


def answer_of(pipeline: Pipeline, images: list[Image.Image]) -> Any:
    prompt = "<image>\n" * len(images) + PROMPT if len(images) > 1 else PROMPT
    return pipeline.generate(ask(prompt, images, NUM_NEW, ignores_eos=True))


@pytest.mark.parametrize("size", [*SIZES, (900, 70), (3, 2), (2000, 1500)])
def test_unpruned_answers_equal_transformers(unpruned: Pipeline, onevision: OneVision, photos: Path, size: Any) -> None:
    image = picture(photos, size)
    inputs = onevision.inputs(PROMPT, [image])
    answer = answer_of(unpruned, [image])
    assert answer.token_ids == onevision.answer(inputs)
    assert answer.num_image_tokens == answer.num_kept_tokens == (inputs["input_ids"] == 511).sum()
    count = unpruned.model.images.count_tokens((image.height, image.width))
    assert (count.num_tokens, count.is_exact) == (answer.num_image_tokens, True)


def test_several_images_are_not_cut(unpruned: Pipeline, onevision: OneVision, photos: Path) -> None:
    images = [picture(photos, (150, 60)), picture(photos, (50, 130), "astronaut.png"), picture(photos, (68, 68))]
    answer = answer_of(unpruned, images)
    assert answer.token_ids == onevision.answer(onevision.inputs(PROMPT, images))
    assert answer.num_image_tokens == 3 * 65
    assert unpruned.model.images.count_tokens((60, 150), 3).num_tokens == 65
    assert [frame.tile_rows for frame in unpruned.model.images.frames(images[0], 3)] == [1]
    [view] = unpruned.model.images.views((60, 150), 3)
    # Padded to a square.
    assert view.region == pytest.approx((0, -45, 150, 105))


@pytest.mark.parametrize("newline", ["kept-rows", "all", "none"])
def test_pruned_answers_are_those_of_the_rule_by_plain_means(
    onevision: OneVision, make: Any, photos: Path, newline: Any
) -> None:
    """Of the bundle, and of `prune`; with views that are interpolated, and several images."""
    pipeline, model = make(preset="192", newline=newline), onevision.load()
    model.model.vision_tower.set_attn_implementation("sdpa")
    with prune(model, EXACT, newline=newline):
        groups = [[picture(photos, size)] for size in SIZES]
        groups.append([picture(photos, (150, 60)), picture(photos, (50, 130), "astronaut.png")])
        for images in groups:
            inputs = onevision.inputs(PROMPT, images)
            embeds, kept = onevision.pruned(inputs, EXACT, newline)
            expected = onevision.answer_to_embeds(embeds)
            assert onevision.answer(inputs, model) == expected, images
            answer = answer_of(pipeline, images)
            assert answer.token_ids == expected, images
            assert [list(indices) for indices in answer.kept_indices] == kept
            num_text = int((inputs["input_ids"] != 511).sum())
            assert answer.num_kept_tokens == len(embeds) - num_text
            sizes = [(image.height, image.width) for image in images]
            counts = [pipeline.model.images.count_tokens(size, len(images)) for size in sizes]
            assert answer.num_kept_tokens <= sum(count.num_tokens for count in counts)


def test_an_interpolated_view_keeps_about_the_share_of_its_patches(make: Any, photos: Path) -> None:
    answer = answer_of(make(preset="192", newline="none"), [picture(photos, (408, 408))])
    # 24 x 24 cells of 48 x 48 patches.
    share = (answer.num_kept_tokens - 21) / 24**2
    assert 0.15 < share < 0.45


def test_a_rule_whose_count_varies_is_pruned_alike(onevision: OneVision, make: Any, photos: Path) -> None:
    spec = PruningSpec(global_ratio=0.75)
    pipeline = make(spec=spec)
    image = picture(photos, (230, 400))
    inputs = onevision.inputs(PROMPT, [image])
    expected = onevision.answer_to_embeds(onevision.pruned(inputs, spec, "kept-rows")[0])
    assert answer_of(pipeline, [image]).token_ids == expected
    with prune(model := onevision.load(), spec):
        assert onevision.answer(inputs, model) == expected


def test_with_every_patch_kept_the_model_is_the_unpruned_one(onevision: OneVision, make: Any, photos: Path) -> None:
    everything = PruningSpec(keep=64)
    pipeline = make(spec=everything, newline="all")
    with prune(model := onevision.load(), everything, newline="all"):
        for size in SIZES:
            inputs = onevision.inputs(PROMPT, [picture(photos, size)])
            expected = onevision.answer(inputs)
            assert onevision.answer(inputs, model) == expected
            assert answer_of(pipeline, [picture(photos, size)]).token_ids == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_is_never_exceeded_and_nearly_used(budgeted: Pipeline, photos: Path, size: Any) -> None:
    answer = answer_of(budgeted, [picture(photos, size)])
    assert answer.num_kept_tokens <= min(200, answer.num_image_tokens)
    assert answer.num_kept_tokens >= min(160, 0.9 * answer.num_image_tokens - 20)
    assert len(answer.kept_indices[0]) >= 7


def test_a_chat_cuts_an_image_otherwise_where_another_joins_it(make: Any, photos: Path) -> None:
    """As if the whole conversation were asked afresh."""
    pipeline = make(preset="192")
    images = [picture(photos, (400, 300)), picture(photos, (150, 60), "astronaut.png")]
    chat = pipeline.chat()
    first = chat.ask(PROMPT, images[:1], at_most(NUM_NEW))
    second = chat.ask("and here", images[1:], at_most(NUM_NEW))
    history = [Message("user", [ImagePart(images[0]), PROMPT]), Message("assistant", [first.text])]
    afresh = pipeline.generate(replace(ask("and here", images[1:], NUM_NEW), history=tuple(history)))
    assert second.token_ids == afresh.token_ids
    assert len(first.kept_indices) > 1
    assert [len(indices) for indices in second.kept_indices] == [21, 21]


@pytest.mark.parametrize(("shape", "size"), [((48, 48), (24, 24)), ((40, 25), (29, 18)), ((9, 31), (7, 2))])
def test_without_pruning_cells_are_those_of_torch(shape: tuple[int, int], size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(*shape, 5)).astype(np.float32)
    cells = interpolated(np.arange(values[..., 0].size).reshape(shape), size)
    assert cells.is_kept.all()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None], list(size), mode="bilinear"
    )
    found = cells.mean(values.reshape(-1, 5)).reshape(*size, 5)
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_the_best_cells_are_those_of_the_highest_scores() -> None:
    cells = interpolated(np.arange(48 * 48).reshape(48, 48), (24, 24))
    scores = np.random.default_rng(1).random(48 * 48).astype(np.float32)
    best = cells.best(scores, 100)
    assert best.is_kept.sum() == len(best.sources) == 100
    means = np.zeros((24, 24))
    means[cells.is_kept] = cells.mean(scores)
    assert means[best.is_kept].min() >= means[~best.is_kept].max()
    tied = cells.best(np.ones_like(scores), 30)
    assert tied.is_kept.ravel()[:30].all()


def test_what_prune_cannot_do_is_refused(onevision: OneVision, photos: Path) -> None:
    inputs = onevision.inputs(PROMPT, [picture(photos, (150, 60))])
    with prune(model := onevision.load(), EXACT) as pruned:
        with pytest.raises(SettingsError, match="videos cannot be pruned"):
            model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 68, 68))
        with pytest.raises(SettingsError, match="vision_aspect_ratio cannot differ"):
            model(**inputs, vision_aspect_ratio="anyres_max_4")
        with pytest.raises(PromptError, match="batch_num_images counts 2 images and image_sizes has 1"):
            pruned.encode(inputs["pixel_values"], inputs["image_sizes"], torch.tensor([2]))
