"""What the canvas shows is what pruning kept, pixel by pixel."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import encoded, flat_patches
from tests.support.serving import asking, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hivtp import Pipeline
    from tests.support.browser import Playground
    from tests.support.serving import Server

pytestmark = pytest.mark.browser
DARK = 110
RED = (250, 40, 20)


def told(server: Server, image: bytes) -> dict[str, Any]:
    """What the server says of an image to another client."""
    include = {"include": ["kept_indices", "importance"]}
    return server.chat(asking("what", image), max_tokens=1, hivtp=include).json()["hivtp"]["images"][0]


def stages_of(tile: dict[str, Any]) -> dict[str, set[int]]:
    """The patches that are shown at each place of the slider."""
    kept = list(zip(tile["kept_indices"], tile["is_global"], strict=True))
    found = {"both": set(tile["kept_indices"]), "global": {index for index, is_global in kept if is_global}}
    return {**found, "local": found["both"] - found["global"]}


def centres(pixels: NDArray[np.uint8], rows: int, cols: int, box: tuple[float, ...] = (0, 0, 1, 1)) -> NDArray[Any]:
    """The pixels in the middle of patches [rows, cols, 3]; `box` is their part of the canvas, as shares of it."""
    left, top, right, bottom = box
    ys = (top + (np.arange(rows) + 0.5) / rows * (bottom - top)) * pixels.shape[0]
    xs = (left + (np.arange(cols) + 0.5) / cols * (right - left)) * pixels.shape[1]
    return pixels[ys.astype(int)[:, None], xs.astype(int)[None, :]].astype(int)


def shown(found: NDArray[Any], colours: Any) -> set[int]:
    """Raster indices of the patches that have their colour; all others must be dark and grey."""
    is_clear = (np.abs(found - np.asarray(colours, int)) <= 4).all(axis=-1).reshape(-1)
    hidden = found.reshape(-1, 3)[~is_clear]
    assert (hidden.max(axis=1) < DARK).all()
    assert (np.ptp(hidden, axis=1) <= 12).all()
    return set(np.flatnonzero(is_clear).tolist())


@pytest.mark.parametrize("scale", [1, 2])
def test_the_slider_shows_what_each_stage_kept(shapes: Server, open_page: Callable[..., Playground], scale: int):
    image, colours = flat_patches(1, 12, 12, 8)
    expected = stages_of(told(shapes, image)["views"][0]["tiles"][0])
    assert len(expected["global"]) == len(expected["local"]) == 36
    playground = open_page(shapes, device_scale_factor=scale)
    playground.add(image)
    # Before anybody asked, all of it is there.
    assert shown(centres(playground.pixels(), 12, 12), colours) == set(range(144))
    playground.ask("Which shape is red?")
    for stage in ("both", "global", "local", "global", "both"):
        playground.set_stage(stage)
        pixels = playground.pixels()
        assert shown(centres(pixels, 12, 12), colours) == expected[stage]
        # Each stage has its colour, on the edge of the patch.
        edges = np.round(np.arange(12) / 12 * pixels.shape[1]).astype(int)
        for name in ("global", "local"):
            is_marked = [
                bool((np.abs(pixels[int((row + 0.5) / 12 * len(pixels)), edges[col]] - colour) <= 8).all())
                for colour in [np.array(playground.colour(f"--{name}"), int)]
                for row in range(12)
                for col in range(12)
            ]
            marked = set(np.flatnonzero(is_marked).tolist())
            assert marked == (expected[name] if stage in ("both", name) else set())


def test_words_say_what_the_slider_shows(shapes: Server, open_page: Callable[..., Playground]):
    playground = open_page(shapes)
    page = playground.page
    assert page.locator("#model span").all_inner_texts() == ["miniature", "preset 288", "keeps 72 of 144 tokens"]
    playground.add(flat_patches(2, 12, 12, 8)[0])
    playground.ask("Which shape is red?")
    assert page.locator("#tokens").inner_text() == "144 → 72 image tokens, 50 % fewer"
    playground.set_stage("global")
    assert (
        "2 × 2 regions, and each keeps the best 25 % of its patches: 36." in page.locator("#explanation").inner_text()
    )
    assert page.locator("#stage").get_attribute("aria-valuetext") == "Global stage only"
    playground.set_stage("local")
    assert "window of 2 × 2 patches" in page.locator("#explanation").inner_text()
    playground.set_stage("both")
    assert "36 + 36 = 72 of 144 patches" in page.locator("#explanation").inner_text()


def test_a_patch_is_read_out(shapes: Server, open_page: Callable[..., Playground]):
    image, _ = flat_patches(3, 12, 12, 8)
    tile = told(shapes, image)["views"][0]["tiles"][0]
    playground = open_page(shapes)
    playground.add(image)
    playground.ask("Which shape is red?")
    canvas, readout = playground.page.locator("#canvas"), playground.page.locator("#readout")
    box = canvas.bounding_box()
    scores = tile["importance"]
    for index in (0, 17, 100, 143):
        row, col = divmod(index, 12)
        x, y = (col + 0.5) / 12 * box["width"], (row + 0.5) / 12 * box["height"]
        canvas.hover(position={"x": x, "y": y})
        rank = 1 + sum(score > scores[index] for score in scores)
        words = readout.inner_text()
        assert words.startswith(f"Row {row + 1}, column {col + 1} · score ")
        assert f"rank {rank} of 144" in words
        stages = stages_of(tile)
        fate = "dropped"
        for name in ("global", "local"):
            fate = f"kept by the {name} stage" if index in stages[name] else fate
        assert words.endswith(fate)
    # The keys do the same.
    canvas.focus()
    for _ in range(30):
        canvas.press("ArrowLeft")
        canvas.press("ArrowUp")
    assert readout.inner_text().startswith("Row 1, column 1 ")
    canvas.press("ArrowDown")
    canvas.press("ArrowRight")
    assert readout.inner_text().startswith("Row 2, column 2 ")


def test_the_score_map_is_ordered_as_the_scores(shapes: Server, open_page: Callable[..., Playground]):
    # Black throughout, so that the colours are those of the map; its patches differ in their place alone.
    image = encoded(Image.new("RGB", (96, 96)))
    scores = np.array(told(shapes, image)["views"][0]["tiles"][0]["importance"])
    playground = open_page(shapes)
    playground.add(image)
    playground.ask("Which shape is red?")
    assert not playground.page.locator("#ramp").is_visible()
    playground.page.check("#scores")
    assert playground.page.locator("#ramp").is_visible()
    assert "layers 4 to 5" in playground.page.locator("#explanation").inner_text()
    # Red grows all along the ramp.
    red = centres(playground.pixels(), 12, 12)[..., 0].reshape(-1)
    order = np.argsort(scores)
    assert (np.diff(red[order]) >= -1).all()
    assert red[order[-1]] - red[order[0]] > 150
    playground.page.uncheck("#scores")
    assert centres(playground.pixels(), 12, 12)[..., 0].max() < 20


def test_a_wide_image_is_dark_where_it_is_cut_off(shapes: Server, open_page: Callable[..., Playground]):
    image, colours = flat_patches(4, 12, 24, 8)
    found = told(shapes, image)
    assert found["views"][0]["region"] == [48, 0, 144, 96]
    playground = open_page(shapes)
    playground.add(image)
    playground.ask("Which shape is red?")
    pixels = playground.pixels()
    assert pixels.shape[1] == pytest.approx(2 * pixels.shape[0], abs=1)
    middle = centres(pixels, 12, 12, (0.25, 0, 0.75, 1))
    assert shown(middle, colours[:, 6:18]) == set(found["views"][0]["tiles"][0]["kept_indices"])
    for box in ((0, 0, 0.25, 1), (0.75, 0, 1, 1)):
        assert centres(pixels, 12, 6, box).max() < 60
    assert "cut off" in playground.page.locator("#explanation").inner_text()


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_turned_photograph_lies_upright_below_its_patches(
    shapes: Server, open_page: Callable[..., Playground], orientation: int
):
    content, colours = flat_patches(5, 12, 24, 8)
    upright = Image.open(io.BytesIO(content))
    # What a camera held that way would have stored.
    back = {3: "ROTATE_180", 5: "TRANSPOSE", 6: "ROTATE_90", 8: "ROTATE_270"}[orientation]
    stored = upright.transpose(Image.Transpose[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = encoded(stored, "JPEG", quality=100, subsampling=0, exif=exif)
    found = told(shapes, photograph)
    assert (found["width"], found["height"]) == upright.size
    playground = open_page(shapes)
    playground.add(photograph, names=("photo.jpg",))
    before = centres(playground.pixels(), 12, 24)
    assert (np.abs(before - colours) <= 12).all()
    playground.ask("Which shape is red?")
    middle = centres(playground.pixels(), 12, 12, (0.25, 0, 0.75, 1))
    is_clear = (np.abs(middle - colours[:, 6:18]) <= 12).all(axis=-1).reshape(-1)
    assert set(np.flatnonzero(is_clear).tolist()) == set(found["views"][0]["tiles"][0]["kept_indices"])


@pytest.mark.parametrize("size", [(120, 60), (60, 130), (90, 90)], ids=str)
def test_both_views_of_a_tiled_image(tiled: Server, open_page: Callable[..., Playground], size: tuple[int, int]):
    image = encoded(Image.new("RGB", size, RED))
    found = told(tiled, image)
    playground = open_page(tiled)
    assert "per tile" in playground.page.locator("#model").inner_text()
    playground.add(image)
    playground.ask("what is it")
    labels = playground.page.locator("#views label")
    rows, cols = found["grid"]
    for number, view in enumerate(found["views"]):
        labels.nth(number).click()
        down, across = view["tile_rows"], view["tile_cols"]
        left, top, right, bottom = view["region"]
        x0, y0, x1, y1 = min(left, 0), min(top, 0), max(right, size[0]), max(bottom, size[1])
        width, height = x1 - x0, y1 - y0
        box = ((left - x0) / width, (top - y0) / height, (right - x0) / width, (bottom - y0) / height)
        for stage in ("both", "global", "local"):
            expected = {
                (place // across * rows + index // cols) * across * cols + place % across * cols + index % cols
                for place, tile in enumerate(view["tiles"])
                for index in stages_of(tile)[stage]
            }
            playground.set_stage(stage)
            assert shown(centres(playground.pixels(), down * rows, across * cols, box), RED) == expected
    assert labels.nth(1).inner_text() == f"{down} × {across} tiles"
    before, kept = found["image_tokens"], found["kept_tokens"]
    assert playground.page.locator("#tokens").inner_text().startswith(f"{before} → {kept} image tokens")


def test_an_unpruned_bundle_shows_that_nothing_is_dropped(unpruned: Pipeline, open_page: Callable[..., Playground]):
    with serving(unpruned.model, max_tokens=4) as server:
        image = encoded(Image.new("RGB", (64, 64), RED))
        playground = open_page(server)
        playground.add(image)
        playground.ask("what is it")
        page = playground.page
        assert "prunes nothing" in page.locator("#explanation").inner_text()
        assert not page.locator("#stage").is_visible()
        assert not page.locator("#scores").is_visible()
        rows, cols = told(server, image)["grid"]
        assert len(shown(centres(playground.pixels(), rows, cols), RED)) == rows * cols
        assert "no pruning" in page.locator("#model").inner_text()


def test_several_images_each_with_its_own_patches(shapes: Server, open_page: Callable[..., Playground]):
    images = [flat_patches(seed, 12, 12, 8) for seed in (6, 7, 8)]
    playground = open_page(shapes)
    playground.add(*(image for image, _ in images))
    playground.page.get_by_role("button", name="Remove b.png").click()
    playground.ask("Which shape is red?")
    del images[1]
    content = playground.requests[-1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    for number, (image, colours) in enumerate(images):
        playground.page.locator("#strip .thumb").nth(number).click()
        kept = told(shapes, image)["views"][0]["tiles"][0]["kept_indices"]
        assert shown(centres(playground.pixels(), 12, 12), colours) == set(kept)
    # What was sent stays in the conversation.
    assert playground.page.locator("#strip .remove").count() == 0
