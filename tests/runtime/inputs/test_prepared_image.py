from __future__ import annotations

import numpy as np

from hivtp.runtime.inputs.prepared_image import PreparedImage
from hivtp.runtime.inputs.tile_layout import TileLayout

PIXELS = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)
LAYOUT = TileLayout(1, 2, (4, 8))


def test_equal_images_have_equal_digests() -> None:
    digest = PreparedImage(PIXELS, LAYOUT).digest
    assert PreparedImage(PIXELS.copy(), TileLayout(1, 2, (4, 8))).digest == digest
    # How the array lies in memory is nobody's concern.
    assert PreparedImage(np.asfortranarray(PIXELS), LAYOUT).digest == digest
    assert len(digest) == 32


def test_a_digest_tells_all_that_decides_the_tokens_apart() -> None:
    """The layout too: two images can have the same pixels on their tiles and other padding."""
    changed = PIXELS.copy()
    changed[2, 1, 3, 0] = np.nextafter(changed[2, 1, 3, 0], 9, dtype=np.float32)
    images = [
        PreparedImage(PIXELS, LAYOUT),
        PreparedImage(changed, LAYOUT),
        PreparedImage(PIXELS[::-1], LAYOUT),
        PreparedImage(PIXELS[:2], LAYOUT),
        PreparedImage(PIXELS.reshape(3, 3, 2, 8), LAYOUT),
        PreparedImage(PIXELS, None),
        PreparedImage(PIXELS, TileLayout(2, 1, (4, 8))),
        PreparedImage(PIXELS, TileLayout(1, 2, (8, 4))),
        PreparedImage(PIXELS, TileLayout(1, 2, (4, 7))),
    ]
    assert len({image.digest for image in images}) == len(images)
