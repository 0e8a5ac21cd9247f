"""How many tokens an image keeps, by its size alone: vLLM makes room for them before the image is encoded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.inputs.tile_layout import TileLayout

if TYPE_CHECKING:
    from hivtp.runtime.integrations.vllm.settings import PluginSettings


def layout_of(settings: PluginSettings, image_size: tuple[int, int]) -> TileLayout:
    """How a LLaVA-NeXT image of this (height, width) in pixels lies on its tiles."""
    assert settings.pinpoints is not None, "an image of LLaVA-1.5 is one tile"
    return TileLayout.on(settings.pinpoints, settings.tile_size, image_size)


def count_tokens(settings: PluginSettings, image_size: tuple[int, int]) -> int:
    """How many tokens an image becomes.

    LLaVA-1.5: `keep`, and the CLS where it is a feature. LLaVA-NeXT: of each tile `keep`, or all its patches outside
    of the padding where those are fewer; and with the newline rule "all" one for each row of patches that is left of
    the tile grid when the model unpads.

    Args:
        settings: with a spec.
        image_size: (height, width) in pixels.
    """
    assert settings.spec is not None, "an unpruned image is vLLM's to count"
    keep = settings.spec.keep
    assert keep is not None, "the settings have an exact count"
    if settings.pinpoints is None:
        return settings.num_prefix_tokens + min(keep, math.prod(settings.grid))
    layout = layout_of(settings, image_size)
    num_patches = layout.patch_mask(settings.grid).sum(axis=1)
    rows = layout.patch_rows(settings.grid)
    num_newlines = len(range(rows.start, rows.stop)) if settings.newline == "all" else 0
    return int(np.minimum(num_patches, keep).sum()) + num_newlines
