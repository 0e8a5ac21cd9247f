from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from hivtp.runtime.device_rows import TOKENS, DeviceRows, concatenate
from hivtp.runtime.packing import NewlineRule, pack_tiles
from hivtp.runtime.tiling import TileLayout
from hivtp.runtime.vision import EncodedTile

TABLE = np.arange(100, 120, dtype=np.float32).reshape(10, 2)


def values(rows: DeviceRows) -> np.ndarray:
    """What the device would gather."""
    picked = [
        TABLE[row] if place == TOKENS else np.asarray(rows.sources[place]).reshape(-1, 2)[row]
        for place, row in zip(rows.source_of, rows.row_of, strict=True)
    ]
    return np.array(picked, dtype=np.float32).reshape(-1, 2)


@pytest.fixture
def image() -> np.ndarray:
    """Two tiles of three rows."""
    return np.arange(12, dtype=np.float32).reshape(2, 3, 2)


def test_tokens_are_rows_of_the_table():
    rows = DeviceRows.of_tokens([3, 9, 3])
    assert len(rows) == 3
    assert rows.nbytes == 0
    np.testing.assert_array_equal(values(rows), TABLE[[3, 9, 3]])


def test_rows_are_cut_and_picked_like_an_array(image):
    rows, array = DeviceRows.of_source(image, 6), image.reshape(6, 2)
    for pick in (slice(2), slice(1, 5), slice(4, None), np.array([5, 0, 5]), array[:, 0] > 3, slice(3, 3)):
        np.testing.assert_array_equal(values(rows[pick]), array[pick])
        assert len(rows[pick]) == len(array[pick])
    np.testing.assert_array_equal(values(DeviceRows.of_source(image, 3, start=3)), image[1])


def test_sequences_are_joined_and_a_source_is_named_once(image):
    tokens = DeviceRows.of_tokens([1, 2, 3])
    first, second = (DeviceRows.of_source(image, 3, start) for start in (0, 3))
    newline = np.full((1, 2), -1, np.float32)
    joined = concatenate([tokens[:1], second, newline, first, newline, tokens[1:]])
    array = np.concatenate([TABLE[[1]], image[1], newline, image[0], newline, TABLE[[2, 3]]])
    np.testing.assert_array_equal(values(joined), array)
    assert len(joined.sources) == 2
    assert joined.nbytes == image.nbytes + newline.nbytes
    order = np.random.default_rng(0).permutation(len(array))
    np.testing.assert_array_equal(values(concatenate([joined[order], tokens])), [*array[order], *TABLE[[1, 2, 3]]])


def test_arrays_alone_stay_an_array(image):
    joined = concatenate([image[0], image[1]])
    assert isinstance(joined, np.ndarray)
    np.testing.assert_array_equal(joined, image.reshape(6, 2))


def test_tiles_on_a_device_are_packed_and_trimmed_as_arrays_are():
    grid, layout, random = (4, 4), TileLayout(2, 1, (80, 50)), np.random.default_rng(0)
    newline, scores = np.full(2, -1, np.float32), random.random((3, 16), dtype=np.float32)
    is_picture = layout.patch_mask(grid)
    kept = [np.flatnonzero(row)[::2] for row in is_picture]
    # As a run leaves them: 16 rows for each tile, of which the first are filled.
    run = random.normal(size=(3, 16, 2)).astype(np.float32)
    arrays = [EncodedTile(run[tile, : len(places)], places, scores[tile]) for tile, places in enumerate(kept)]
    on_device = [
        EncodedTile(DeviceRows.of_source(run, len(places), tile * 16), places, scores[tile])
        for tile, places in enumerate(kept)
    ]
    for rule in get_args(NewlineRule):
        expected, found = (pack_tiles(layout, grid, tiles, newline, rule) for tiles in (arrays, on_device))
        assert isinstance(found, DeviceRows)
        np.testing.assert_array_equal(values(found), expected)
    picked = on_device[1].embeds[np.array([3, 0])]
    np.testing.assert_array_equal(values(picked), arrays[1].embeds[[3, 0]])
