"""Rules that choose which patches to keep: HIVTP, those that it is compared with, and two that bracket them all.

Each is written from the description in its paper, for comparison only; nothing here is part of the packages.
A rule is called with what the vision tower gave and with how many patches to keep of every picture. It returns
[pictures, count] int64: raster indices in ascending order, and -1 at the end where it keeps fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops import PruningSpec, select
from hivtp_ops.partition import window_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """What the vision tower gave for some pictures: the attention of every layer that ran, and the features.

    Attributes:
        received: [pictures, layers, patches] float32, the attention that each patch receives: post-softmax, mean
            over heads and over all queries, the class token's among them.
        from_class: [pictures, layers, patches] float32, the class token's attention to each patch, mean over heads.
        embeds: [pictures, patches, hidden] float32, the features as the language model takes them.
        foreground: [pictures, patches] bool, the patches that show something; no rule looks at it but the oracle
            and its adversary.
        seeds: [pictures] int64, one for each picture, for rules that draw.
        grid: rows and columns of patches.
    """

    received: NDArray[np.float32]
    from_class: NDArray[np.float32]
    embeds: NDArray[np.float32]
    foreground: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    grid: tuple[int, int]

    def __getitem__(self, pictures: slice | NDArray[Any]) -> Encoded:
        """Some of the pictures."""
        arrays = [item.name for item in fields(self) if item.name != "grid"]
        return replace(self, **{name: getattr(self, name)[pictures] for name in arrays})


Rule = Callable[[Encoded, int], "NDArray[np.int64]"]


def spec_for(count: int, grid: tuple[int, int]) -> PruningSpec:
    """The settings of HIVTP for an exact count; on 24 x 24 they are those of the presets 288, 192, 128 and 64.

    The window is the smallest whose windows ask for at most 0.6 of the count; the global stage has the rest.
    """
    rows, cols = grid
    for window in range(1, min(grid) + 1):
        num_windows = math.ceil(rows / window) * math.ceil(cols / window)
        if num_windows <= 0.6 * count:
            break
    else:
        num_windows = 0
    return PruningSpec(window=window, global_ratio=(count - num_windows) / (rows * cols), keep=count)


@dataclass(frozen=True)
class Hivtp:
    """HIVTP (arXiv 2509.23663): global stage by region, local stage by window, as `hivtp_ops.select` defines it.

    Attributes:
        first_layer: first scoring layer, 0-based.
        num_layers: number of scoring layers.
        is_exact: True keeps exactly the count; False what the two stages give, as in the paper.
        overrides: settings of the spec to set apart from those of `spec_for`.
    """

    first_layer: int
    num_layers: int
    is_exact: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, count: int, grid: tuple[int, int]) -> PruningSpec:
        """The settings for a count."""
        spec = replace(
            spec_for(count, grid), first_layer=self.first_layer, num_layers=self.num_layers, **self.overrides
        )
        return spec if self.is_exact else replace(spec, keep=None)

    def __call__(self, encoded: Encoded, count: int) -> NDArray[np.int64]:
        """Keep the patches."""
        importance = encoded.received[:, self.first_layer : self.first_layer + self.num_layers].mean(axis=1)
        return select(importance, encoded.grid, self.spec(count, encoded.grid)).indices


def global_stage(encoded: Encoded, count: int, *, first_layer: int, num_layers: int) -> NDArray[np.int64]:
    """The first stage of HIVTP alone: the best of each region, an equal share of the count for each."""
    # With a window of one patch, what the regions' quotas leave of the count goes by score alone.
    overrides = {"global_ratio": count / math.prod(encoded.grid), "window": 1}
    return Hivtp(first_layer, num_layers, overrides=overrides)(encoded, count)


def local_stage(encoded: Encoded, count: int, *, first_layer: int, num_layers: int) -> NDArray[np.int64]:
    """The second stage of HIVTP alone: the best of each window, then each window's second best, and so on.

    The window is the smallest of which there are at most `count`; those that come last are taken by score.
    """
    rows, cols = encoded.grid
    window = next(
        side for side in range(1, max(encoded.grid) + 1) if math.ceil(rows / side) * math.ceil(cols / side) <= count
    )
    scores = encoded.received[:, first_layer : first_layer + num_layers].mean(axis=1)
    of_patch = window_ids(encoded.grid, window)
    is_rival = of_patch[:, None] == of_patch
    ranks = _ranks(scores)
    is_beaten = is_rival & (ranks[:, None, :] < ranks[:, :, None])
    return _keep_first(np.lexsort((ranks, is_beaten.sum(axis=2))), count)


def column_mean(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """The attention received in the last layer that ran: the score of HIVTP without its middle layers and stages."""
    return _keep_best(encoded.received[:, -1], count)


def class_attention(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """The class token's attention, mean of the last two layers that ran."""
    return _keep_best(encoded.from_class[:, -2:].mean(axis=1), count)


def visionzip(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """VisionZip (arXiv 2412.04467, section 2.3): the dominant tokens.

    They are those that get most of the class token's attention in the layer whose output is kept. The paper's
    contextual tokens are mixtures of the others, not patches, and its class token is none either: all of the count
    goes to dominant patches here.
    """
    return _keep_best(encoded.from_class[:, -1], count)


@dataclass(frozen=True)
class HiPrune:
    """HiPrune (arXiv 2508.00553, Method): anchors, their neighbours, and registers.

    Anchors receive most attention in the object layer; buffers are the four patches around each; registers, which
    fill the count, receive most attention in the last layer that ran.

    Attributes:
        object_layer: 0-based; the paper's is the ninth of 24.
        alpha: share of the count for anchors and buffers, the paper's.
    """

    object_layer: int
    alpha: float = 0.1

    def __call__(self, encoded: Encoded, count: int) -> NDArray[np.int64]:
        """Keep the patches."""
        rows, cols = encoded.grid
        num_anchors = round(count * self.alpha / 5)
        is_anchor = _ranks(encoded.received[:, self.object_layer]) < num_anchors
        cells = np.pad(is_anchor.reshape(-1, rows, cols), ((0, 0), (1, 1), (1, 1)))
        middle = np.s_[1:-1]
        is_chosen = (
            cells[:, middle, middle]
            | cells[:, :-2, middle]
            | cells[:, 2:, middle]
            | cells[:, middle, :-2]
            | cells[:, middle, 2:]
        ).reshape(is_anchor.shape)
        return _keep_first(np.lexsort((_ranks(encoded.received[:, -1]), ~is_chosen)), count)


def divprune(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """DivPrune (arXiv 2503.02175): the subset whose minimum distance between two members is largest, greedily.

    Distances are cosine distances of the language model's inputs. The first patch is the one whose nearest
    neighbour is farthest; each further one is the farthest from all that were chosen.
    """
    unit = encoded.embeds / np.linalg.norm(encoded.embeds, axis=2, keepdims=True)
    distances = 1.0 - unit @ unit.transpose(0, 2, 1)
    pictures = np.arange(len(distances))
    chosen = [np.min(distances, axis=2, where=~np.eye(distances.shape[1], dtype=bool), initial=np.inf).argmax(axis=1)]
    nearest = distances[pictures, chosen[0]]
    for _ in range(count - 1):
        nearest[pictures, chosen[-1]] = -np.inf
        chosen.append(nearest.argmax(axis=1))
        nearest = np.minimum(nearest, distances[pictures, chosen[-1]])
    return np.sort(np.stack(chosen, axis=1), axis=1)


def uniform_grid(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """The same patches of every picture, spread evenly: the order of an ordered dither (Bayer, 1973).

    A quarter is every other row and column, half is a checkerboard.
    """
    rows, cols = encoded.grid
    row, col = (axis.reshape(-1) for axis in np.mgrid[:rows, :cols])
    rank = np.zeros(rows * cols, dtype=np.int64)
    for _ in range((max(rows, cols) - 1).bit_length()):
        rank = 4 * rank + 2 * ((row ^ col) & 1) + (row & 1)
        row, col = row >> 1, col >> 1
    kept = np.sort(np.argsort(rank, kind="stable")[:count])
    return np.tile(kept, (len(encoded.seeds), 1))


def random_patches(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """Patches drawn by lot, each picture by its seed."""
    return _keep_best(_lots(encoded), count)


def oracle(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """Those that show something first, else by lot: what a rule could reach that knew them."""
    return _keep_best(_lots(encoded) + encoded.foreground, count)


def adversary(encoded: Encoded, count: int) -> NDArray[np.int64]:
    """Those that show something last, else by lot: what is left when a rule, or an index, goes wrong."""
    return _keep_best(_lots(encoded) - encoded.foreground, count)


def _lots(encoded: Encoded) -> NDArray[np.float64]:
    """A number from 0 to 1 for every patch: [pictures, patches]."""
    num_patches = math.prod(encoded.grid)
    # The second number parts these draws from those that made the picture of the same seed.
    return np.stack([np.random.default_rng((int(seed), 1)).random(num_patches) for seed in encoded.seeds])


def _keep_best(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    # A stable sort leaves equal scores in raster order, as in HIVTP.
    return _keep_first(np.argsort(-scores, axis=1, kind="stable"), count)


def _keep_first(order: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.sort(order[:, :count], axis=1)


def _ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """The place of every patch in the order of the scores, 0 for the best: [pictures, patches]."""
    return np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")


def all_rules(first_layer: int, num_layers: int, object_layer: int) -> dict[str, Rule]:
    """Every rule by its name.

    Args:
        first_layer: first scoring layer of HIVTP and of its stages alone.
        num_layers: number of their scoring layers.
        object_layer: of HiPrune.
    """

    def scored(stage: Callable[..., NDArray[np.int64]]) -> Rule:
        return lambda encoded, count: stage(encoded, count, first_layer=first_layer, num_layers=num_layers)

    return {
        "HIVTP": Hivtp(first_layer, num_layers),
        "HIVTP, paper counts": Hivtp(first_layer, num_layers, is_exact=False),
        "global stage only": scored(global_stage),
        "local stage only": scored(local_stage),
        "column mean, last layer": column_mean,
        "class attention": class_attention,
        "VisionZip, dominant": visionzip,
        "HiPrune": HiPrune(object_layer),
        "DivPrune": divprune,
        "uniform grid": uniform_grid,
        "random": random_patches,
        "oracle": oracle,
        "adversary": adversary,
    }
