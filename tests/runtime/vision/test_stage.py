from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.engines import open_vision_engine
from hivtp.engines.base import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.engines.manifest import VisionManifest
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.options import MAX_TILES_PER_RUN
from hivtp.runtime.vision.stage import VisionStage
from hivtp_ops import select
from hivtp_ops.errors import EngineError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "page.png")
MANIFEST = VisionManifest(
    file="model.onnx",
    graph="vision",
    precision="fp32",
    num_layers=6,
    grid=(2, 2),
    image_size=4,
    num_prefix_tokens=0,
    capacity=3,
    hidden_size=2,
)


class FakeEngine:
    """Gives what it was given."""

    def __init__(self, **outputs: np.ndarray) -> None:
        self.outputs = outputs
        self.output_names = tuple(outputs)
        self.max_tiles = None

    def run(self, _inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


def pruning_engine(num_prefix_tokens: int = 0) -> FakeEngine:
    """Two tiles of 2 x 2 patches: one keeps two of at most three, the other none."""
    num_rows = num_prefix_tokens + 3
    return FakeEngine(
        image_embeds=np.arange(2 * num_rows * 2, dtype=np.float32).reshape(2, num_rows, 2),
        kept_indices=np.array([[1, 3, -1], [-1, -1, -1]]),
        kept_counts=np.array([2, 0]),
        importance=np.full((2, 4), 0.25, np.float32),
    )


def open_stage(folder: Path, max_tiles_per_run: int = MAX_TILES_PER_RUN) -> VisionStage:
    bundle = Bundle.open(folder)
    engine = open_vision_engine(bundle, "onnxruntime", EngineSettings(1), trust_plans=False)
    return VisionStage(engine, bundle.manifest.vision, max_tiles_per_run)


@pytest.fixture(scope="module")
def pixels(pruned_bundle: Path, photos: Path) -> np.ndarray:
    processor = ImageProcessor.from_config(Bundle.open(pruned_bundle).read_json("image_processor.json"))
    return processor([load_image(photos / name) for name in PHOTOS])


@pytest.fixture(scope="module")
def stages(
    pruned_bundle: Path, unpruned_bundle: Path, exact_bundle: Path, varying_bundle: Path
) -> dict[str, VisionStage]:
    folders = {"pruned": pruned_bundle, "unpruned": unpruned_bundle, "exact": exact_bundle, "varying": varying_bundle}
    return {name: open_stage(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["pruned", "unpruned", "exact", "varying"])
def test_a_tile_in_a_batch_gives_what_it_gives_alone_whatever_the_batch(stages, pixels, name):
    alone = [stages[name].encode(tile[None])[0] for tile in pixels]
    for start, stop in [(0, 5), (0, 2), (1, 4), (4, 5)]:
        tiles = stages[name].encode(pixels[start:stop])
        assert len(tiles) == stop - start
        for tile, expected in zip(tiles, alone[start:stop], strict=True):
            np.testing.assert_array_equal(tile.patches.kept_indices, expected.patches.kept_indices)
            np.testing.assert_allclose(tile.embeds, expected.embeds, atol=1e-5)
            if expected.patches.importance is not None:
                np.testing.assert_allclose(tile.patches.importance, expected.patches.importance, atol=1e-7)


@pytest.mark.parametrize(("name", "count"), [("pruned", 32), ("exact", 21)])
def test_a_tile_has_the_tokens_that_the_rule_keeps_in_raster_order(stages, pixels, name, count):
    for tile in stages[name].encode(pixels):
        assert tile.embeds.shape == (count, 64)
        assert tile.patches.kept_indices.shape == (count,)
        assert (np.diff(tile.patches.kept_indices) > 0).all()
        assert tile.patches.importance.shape == (64,)


def test_without_pruning_a_tile_has_every_token_and_no_scores(stages, pixels):
    for tile in stages["unpruned"].encode(pixels):
        assert tile.embeds.shape == (64, 64)
        assert tile.patches.kept_indices.tolist() == list(range(64))
        assert tile.patches.importance is None


def test_kept_tokens_are_the_unpruned_ones_at_their_indices(stages, pixels):
    whole = stages["unpruned"].encode(pixels)
    for name in ("pruned", "exact", "varying"):
        for tile, all_tokens in zip(stages[name].encode(pixels), whole, strict=True):
            np.testing.assert_allclose(tile.embeds, all_tokens.embeds[tile.patches.kept_indices], atol=1e-5)


def test_rows_beyond_a_tile_s_count_are_left_out(stages, pixels):
    stage = stages["varying"]
    outputs = stage.engine.run({"pixel_values": pixels})
    tiles = stage.encode(pixels)
    counts = [len(tile.embeds) for tile in tiles]
    assert len(set(counts)) > 1
    assert min(counts) < stage.manifest.capacity == outputs["image_embeds"].shape[1]
    for tile, embeds, indices, count in zip(
        tiles, outputs["image_embeds"], outputs["kept_indices"], counts, strict=True
    ):
        assert tile.patches.kept_indices.tolist() == indices[:count].tolist()
        assert (indices[count:] == -1).all()
        assert (embeds[count:] == 0).all()


def test_the_graph_keeps_what_select_keeps_of_its_scores(pruned_bundle, exact_bundle, varying_bundle, pixels):
    for folder in (pruned_bundle, exact_bundle, varying_bundle):
        tiles = open_stage(folder).encode(pixels)
        spec = Bundle.open(folder).manifest.pruning
        selection = select(np.stack([tile.patches.importance for tile in tiles]), (8, 8), spec)
        for tile, indices, count in zip(tiles, selection.indices, selection.counts, strict=True):
            np.testing.assert_array_equal(tile.patches.kept_indices, indices[:count])


def test_different_pictures_keep_different_patches(stages, pixels):
    kept = {tuple(tile.patches.kept_indices.tolist()) for tile in stages["pruned"].encode(pixels)}
    assert len(kept) == len(PHOTOS)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_prefix_tokens_stand_in_front_and_do_not_count(num_prefix_tokens):
    engine = pruning_engine(num_prefix_tokens)
    manifest = VisionManifest(**(vars(MANIFEST) | {"num_prefix_tokens": num_prefix_tokens}))
    first, second = VisionStage(engine, manifest, 8).encode(np.zeros((2, 3, 4, 4), np.float32))
    embeds = engine.outputs["image_embeds"]
    np.testing.assert_array_equal(first.embeds, embeds[0, : num_prefix_tokens + 2])
    assert first.patches.kept_indices.tolist() == [1, 3]
    np.testing.assert_array_equal(second.embeds, embeds[1, :num_prefix_tokens])
    assert second.patches.kept_indices.tolist() == []


def test_nan_in_the_scores_is_an_error_that_names_the_tile():
    engine = pruning_engine()
    engine.outputs["importance"][1, 2] = np.nan
    with pytest.raises(ScoreError, match=r"scores of tile 1 hold NaN.*--vision-precision fp32"):
        VisionStage(engine, MANIFEST, 8).encode(np.zeros((2, 3, 4, 4), np.float32))


def test_tiles_in_several_runs_give_what_they_give_in_one(pruned_bundle, pixels):
    in_one, in_several = (open_stage(pruned_bundle, max_tiles_per_run=size).encode(pixels) for size in (5, 2))
    for tile, expected in zip(in_several, in_one, strict=True):
        np.testing.assert_array_equal(tile.patches.kept_indices, expected.patches.kept_indices)
        np.testing.assert_allclose(tile.embeds, expected.embeds, atol=1e-5)


def test_tiles_of_an_int8_graph_give_together_what_they_give_alone(tiny_checkpoint, tmp_path, pixels):
    settings = ExportSettings(preset="192", vision_precision="int8")
    stage = open_stage(export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True).folder)
    for tile, pixel_values in zip(stage.encode(pixels), pixels, strict=True):
        [alone] = stage.encode(pixel_values[None])
        # Equal but for the order in which floats are added: no scale is shared.
        np.testing.assert_allclose(tile.embeds, alone.embeds, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(tile.patches.kept_indices, alone.patches.kept_indices)


NOT_THERE = "keeps patches that the image does not have, of 4 in a tile"


@pytest.mark.parametrize(
    ("output", "value", "message"),
    [
        ("kept_indices", np.array([[1, 4, -1], [-1, -1, -1]]), NOT_THERE),
        ("kept_indices", np.array([[-1, 3, -1], [-1, -1, -1]]), NOT_THERE),
        ("kept_indices", np.array([[3, 1, -1], [-1, -1, -1]]), NOT_THERE),
        ("kept_indices", np.array([[1, 1, -1], [-1, -1, -1]]), NOT_THERE),
        (
            "kept_indices",
            np.zeros((2, 3)),
            r"kept_indices is float64 of shape \[2, 3\], and .* integer of shape \[2, 3\]",
        ),
        ("kept_counts", np.array([4, 0]), NOT_THERE),
        ("kept_counts", np.array([-1, 0]), NOT_THERE),
        ("kept_counts", np.array([2]), r"kept_counts is int64 of shape \[1\], and .* integer of shape \[2\]"),
        ("importance", np.zeros((2, 5), np.float32), r"importance is float32 of shape \[2, 5\].*\[2, 4\]"),
        ("importance", np.zeros((2, 4)), "importance is float64"),
        ("image_embeds", np.zeros((2, 3, 7), np.float32), r"image_embeds is float32 of shape \[2, 3, 7\].*\[2, 3, 2\]"),
        ("image_embeds", np.zeros((2, 3, 2), np.float16), "image_embeds is float16"),
    ],
)
def test_outputs_that_the_manifest_does_not_describe_are_refused(output, value, message):
    """A bundle may come from a stranger."""
    engine = pruning_engine()
    engine.outputs[output] = value
    with pytest.raises(EngineError, match=message):
        VisionStage(engine, MANIFEST, 8).encode(np.zeros((2, 3, 4, 4), np.float32))


def test_a_kept_patch_of_the_padding_is_refused():
    pixels, mask = np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 4), bool)
    stage = VisionStage(pruning_engine(), MANIFEST, 8)
    mask[0, 2] = False
    assert len(stage.encode(pixels, mask)) == 2
    mask[0, 3] = False
    with pytest.raises(EngineError, match=NOT_THERE):
        stage.encode(pixels, mask)


def test_an_output_that_is_absent_is_named():
    engine = pruning_engine()
    del engine.outputs["importance"]
    with pytest.raises(EngineError, match="importance is absent"):
        VisionStage(engine, MANIFEST, 8).encode(np.zeros((2, 3, 4, 4), np.float32))
