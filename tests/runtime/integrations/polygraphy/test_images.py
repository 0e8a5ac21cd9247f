from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from polygraphy.exception import PolygraphyException

from hivtp.engines import open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.integrations.polygraphy.images import bundle_images, find_bundle, image_feeds
from hivtp.runtime.vision import VisionOptions, create_image_encoder
from hivtp_ops.errors import BundleError, ImageError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.base import Arrays


class Recorder:
    """An engine that keeps what it was given."""

    max_tiles = None
    description = "recorder"

    def __init__(self, bundle: Bundle) -> None:
        self.engine = open_vision_engine(bundle, "onnxruntime")
        self.output_names = self.engine.output_names
        self.feeds: list[Arrays] = []

    def run(self, inputs: Arrays) -> dict[str, Any]:
        self.feeds.append(inputs)
        return self.engine.run(inputs)


@pytest.mark.parametrize("name", ["bare_bundle", "next_bundle", "int8_bundle", "next_int8_bundle"])
def test_inputs_are_what_a_pipeline_gives_to_the_engine(name, images, request):
    bundle = Bundle.open(request.getfixturevalue(name))
    recorder = Recorder(bundle)
    encoder = create_image_encoder(bundle, recorder, VisionOptions(cache_bytes=0))
    for image, feeds in zip(images, image_feeds(bundle, images), strict=True):
        recorder.feeds.clear()
        encoder.encode([encoder.prepare(load_image(image))])
        assert len(feeds) == len(recorder.feeds)
        for feed, expected in zip(feeds, recorder.feeds, strict=True):
            assert set(feed) == set(expected)
            assert all(np.array_equal(feed[name], expected[name]) for name in expected)


def test_llava_next_gives_the_tiles_of_an_image_to_one_run_with_their_mask(next_bundle, images):
    feeds = image_feeds(Bundle.open(next_bundle), images)
    assert [[len(feed["pixel_values"]) for feed in image] for image in feeds] == [[5], [5], [4]]
    masks = [image[0]["patch_mask"] for image in feeds]
    assert all(mask.dtype == np.bool_ and mask[0].all() for mask in masks)
    assert not all(mask.all() for mask in masks)


def test_more_tiles_than_a_run_takes_are_divided(next_bundle, images):
    [feeds] = image_feeds(Bundle.open(next_bundle), images[:1], max_tiles=2)
    [[whole]] = image_feeds(Bundle.open(next_bundle), images[:1])
    assert [len(feed["pixel_values"]) for feed in feeds] == [2, 2, 1]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([feed[name] for feed in feeds]), array)


@pytest.mark.parametrize(("max_tiles", "sizes"), [(None, [5, 5, 4]), (3, [3, 2, 3, 2, 3, 1])])
def test_tiles_beyond_the_most_of_a_run_take_another(next_bundle, images, max_tiles, sizes):
    runs = [run for feeds in image_feeds(Bundle.open(next_bundle), images, max_tiles) for run in feeds]
    assert [len(run["pixel_values"]) for run in runs] == sizes


def test_a_data_loader_gives_one_run_after_the_other(next_int8_bundle, images):
    feeds = bundle_images(str(next_int8_bundle / "vision" / "model.onnx"), images)
    assert [len(feed["pixel_values"]) for feed in feeds] == [5, 5, 4]


def test_a_bad_image_is_named(bare_bundle, next_bundle, tmp_path, images):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"these are words")
    with pytest.raises(ImageError, match=r"broken\.png'?: not an image, or a damaged one"):
        image_feeds(Bundle.open(bare_bundle), [images[0], str(broken)])
    thin = np.zeros((3_000_000, 2), np.uint8)
    with pytest.raises(ImageError, match=r"the array of shape \[3000000, 2\] .*too long and thin"):
        image_feeds(Bundle.open(next_bundle), [thin])


def test_an_encoder_bundle_says_that_it_prepares_no_images(make_bundle, images):
    bundle = Bundle.open(make_bundle(graph="encoder"))
    with pytest.raises(BundleError, match=r"image_processor\.json"):
        image_feeds(bundle, images)


@pytest.mark.parametrize("name", ["vision/model.onnx", "vision/plans/some.plan", "", "manifest.json"])
def test_the_bundle_of_a_file_is_found(bare_bundle, name):
    assert find_bundle(bare_bundle / name).manifest == Bundle.open(bare_bundle).manifest


def test_a_file_outside_of_a_bundle_is_refused(bare_bundle, tmp_path, images):
    graph = shutil.copy(bare_bundle / "vision" / "model.onnx", tmp_path)
    with pytest.raises(BundleError, match=r"does not lie in a bundle; give the vision/model\.onnx of a folder"):
        find_bundle(graph)
    with pytest.raises(PolygraphyException, match="does not lie in a bundle"):
        bundle_images(str(graph), images)
    deep: Path = tmp_path / "manifest.json"
    deep.write_text("{}")
    with pytest.raises(BundleError, match="cannot open the bundle"):
        find_bundle(graph)
