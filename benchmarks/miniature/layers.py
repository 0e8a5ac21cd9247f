"""Which layers of the miniature's tower to prune by: those whose kept patches show most, on calibration pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.miniature.model import NUM_VISION_LAYERS, normalise, run_tower
from benchmarks.miniature.pictures import GRID, Picture
from hivtp_ops import PruningSpec, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# They keep 72, 32 and 16 of the miniature's 144 patches.
PRESETS = ("288", "128", "64")
MAX_LAYERS = 3


@dataclass(frozen=True)
class LayerRange:
    """Layers to prune by, and what they are worth.

    Args:
        first_layer: the first of them, 0-based.
        num_layers: how many.
        ratio: their mean score of a patch that shows something, over that of one that shows the ground.
        foreground_kept: by preset, see `foreground_share`.
    """

    first_layer: int
    num_layers: int
    ratio: float
    foreground_kept: dict[str, float]

    @property
    def worth(self) -> float:
        """The mean share over the presets; the higher the better."""
        return sum(self.foreground_kept.values()) / len(self.foreground_kept)

    def fit(self, preset: str) -> PruningSpec:
        """The spec of a preset on the miniature's grid, with these layers."""
        spec = PruningSpec.preset(preset, (GRID, GRID))
        return replace(spec, first_layer=self.first_layer, num_layers=self.num_layers)


def rank_layers(model: Any, pictures: Sequence[Picture]) -> list[LayerRange]:
    """Every range of up to MAX_LAYERS layers that run, the best first.

    Args:
        model: the miniature, with eager attention.
        pictures: to choose by; they should not be those that results are measured on.
    """
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in pictures]))
    _, received, _ = run_tower(model, normalise(pixels))
    is_foreground = np.stack([picture.foreground for picture in pictures])
    ranges = [
        _score(first, count, received[:, first : first + count].mean(dim=1).numpy(), is_foreground)
        for count in range(1, MAX_LAYERS + 1)
        for first in range(NUM_VISION_LAYERS - count + 1)
    ]
    return sorted(ranges, key=lambda layers: layers.worth, reverse=True)


def foreground_share(is_foreground: NDArray[np.bool_], kept: NDArray[np.int64]) -> float:
    """The kept patches that show something, as a share of the most that as many patches could.

    Args:
        is_foreground: [pictures, patches].
        kept: [pictures, count] raster indices.
    """
    num_shown = np.take_along_axis(is_foreground, kept, axis=1).sum()
    return float(num_shown / np.minimum(is_foreground.sum(axis=1), kept.shape[1]).sum())


def _score(first: int, count: int, scores: NDArray[np.float32], is_foreground: NDArray[np.bool_]) -> LayerRange:
    layers = LayerRange(first, count, float(scores[is_foreground].mean() / scores[~is_foreground].mean()), {})
    for preset in PRESETS:
        kept = select(scores, (GRID, GRID), layers.fit(preset)).indices
        layers.foreground_kept[preset] = foreground_share(is_foreground, kept)
    return layers
