from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint import image_settings as module
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.image_settings import image_settings
from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path


def settings_of(folder: Path) -> dict:
    original = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    return image_settings(Checkpoint.open(folder), original)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 64},
        {"size": [64, 90]},
        {"size": {"height": 70, "width": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": 80}},
        {"size": {"shortest_edge": 64, "longest_edge": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": None}},
        {"size": {"max_height": 90, "max_width": 70}},
        {"size": {"shortest_edge": 64}, "default_to_square": True},
        {"size": {"height": 64, "width": 64}, "do_center_crop": False},
        {"crop_size": 64},
        {"crop_size": [64, 64]},
        {"do_resize": False},
        {"image_mean": 0.5, "do_rescale": False},
    ],
)
def test_what_transformers_can_preprocess_a_bundle_does_as_well(broken: Path, kind: str, settings: dict) -> None:
    file = broken / "preprocessor_config.json"
    edit_json(file, image_processor_type=kind, **settings)
    found = ImageProcessor.from_config(settings_of(broken))
    original = AutoImageProcessor.from_pretrained(broken, local_files_only=True, backend="pil")
    random = np.random.default_rng(1)
    for height, width in ((50, 130), (131, 40), (64, 64), (64, 100), (300, 301)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        np.testing.assert_array_equal(found([image]), original(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 64}}, "longest_edge"),
        ({"size": {"min_pixels": 64, "max_pixels": 4096}}, "max_pixels"),
        ({"size": {"shortest_edge": 0}}, r"size is \(?0"),
        ({"size": {"shortest_edge": 64.5}}, "64.5"),
        ({"size": {"shortest_edge": -4}}, r"size is \(?-4"),
        ({"crop_size": {"shortest_edge": 64}}, "crop_size"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": 9}, "resample is 9"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"crop_size": {"height": 32, "width": 32}}, "the vision tower takes 64 x 64|tiles of 32"),
        ({"image_processor_type": "ViTImageProcessor"}, "has the image processor 'ViTImageProcessor'; supported"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path, family: str, settings: dict, message: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family=family)
    edit_json(folder / "preprocessor_config.json", **settings)
    with pytest.raises(CheckpointError, match=message):
        settings_of(folder)


@pytest.mark.parametrize("settings", [{}, {"size": 64}, {"size": {"height": 64, "width": 64}}, {"do_normalize": False}])
def test_the_tiles_of_llava_next_are_those_of_transformers(tmp_path: Path, settings: dict) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    edit_json(folder / "preprocessor_config.json", **settings)
    assert settings_of(folder)["image_processor_type"] == "LlavaNextImageProcessor"


def test_pinpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    edit_json(folder / "preprocessor_config.json", image_grid_pinpoints=[[64, 128]])
    with pytest.raises(CheckpointError, match="have different image_grid_pinpoints"):
        settings_of(folder)


def test_pixels_that_differ_from_those_of_transformers_are_noticed(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the images of the check come from somewhere else."""
    preprocess = module.FAMILIES["llava"].preprocess
    settings = settings_of(broken)
    original = AutoImageProcessor.from_pretrained(broken, local_files_only=True, backend="pil")
    family = module.FAMILIES["llava"]
    faulty = type(family)(**{**vars(family), "preprocess": lambda *given: preprocess(*given) + np.float32(1e-6)})
    monkeypatch.setitem(module.FAMILIES, "llava", faulty)
    with pytest.raises(CheckpointError, match="preprocesses images in another way than transformers does"):
        image_settings(Checkpoint.open(broken), original)
    assert settings["size"] == {"shortest_edge": 64}
