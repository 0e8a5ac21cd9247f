"""From the tiles of an image to its tokens: order, newlines, and one budget over all tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

import numpy as np

from hivtp.runtime.vision.interpolation import interpolated, view_size
from hivtp.runtime.vision.stage import EncodedTile, KeptPatches
from hivtp_ops import select
from hivtp_ops.errors import BundleError, EngineError, ScoreError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout
    from hivtp_ops import PruningSpec

NewlineRule: TypeAlias = Literal["kept-rows", "all", "none"]


def newline_rule(name: str) -> NewlineRule:
    """The rule of a name, as a manifest holds it.

    Raises:
        BundleError: there is no such rule.
    """
    for rule in get_args(NewlineRule):
        if rule == name:
            return cast("NewlineRule", rule)
    raise BundleError(f"the bundle's newline rule is {name!r}; known are {', '.join(get_args(NewlineRule))}")


def pack_tiles(
    layout: TileLayout,
    grid: tuple[int, int],
    tiles: Sequence[EncodedTile],
    newline: NDArray[np.float32],
    rule: NewlineRule,
    size: tuple[int, int] | None = None,
    max_tokens: int | None = None,
) -> NDArray[np.float32]:
    """Put the kept tokens of an image's tiles into the order in which the unpruned model has them.

    First those of the base tile in raster order, then those of the tile grid in raster order of the whole
    unpadded image, row by row across the tiles. With every patch of the image kept, "all" gives what
    transformers' `LlavaNextModel.pack_image_features` gives; so does "kept-rows", unless the image is so tall
    and thin that unpadding leaves none of its columns, where transformers still has a newline for every row.

    Args:
        layout: how the image lies on the tiles.
        grid: rows and columns of patches in one tile.
        tiles: one for each tile, the base tile first; no patch of the padding is kept.
        newline: [hidden] float32, the model's `image_newline`.
        rule: which rows of the unpadded image a newline follows: those that kept a token, all, or none.
        size: of the view of the tile grid, where it is interpolated to fewer rows and columns; see `view_size`.
        max_tokens: of an interpolated view and the base tile together, newlines not counted.

    Returns:
        [num_tokens, hidden] float32.
    """
    assert len(tiles) == layout.num_tiles, "one encoded tile for each tile of the layout"
    for tile, is_image in zip(tiles, layout.patch_mask(grid), strict=True):
        assert len(tile.embeds) == len(tile.patches.kept_indices), "LLaVA-NeXT has no prefix tokens"
        assert is_image[tile.patches.kept_indices].all(), "a patch of the padding was kept"
    base, *rest = tiles
    if not rest:
        # One that is not cut: its newline follows the whole.
        has_newline = rule == "all" or (rule == "kept-rows" and len(base.embeds) > 0)
        return np.concatenate([base.embeds, newline[None]]) if has_newline else base.embeds
    if size is not None and size != view_size(layout, grid, None):
        max_cells = None if max_tokens is None else max(max_tokens - len(base.embeds), 0)
        view = _interpolated_view(layout, grid, rest, newline, rule, size, max_cells)
        return np.concatenate([base.embeds, view])

    rows, cols = [], []
    for index, tile in enumerate(rest):
        tile_row, tile_col = divmod(index, layout.tile_cols)
        row, col = np.divmod(tile.patches.kept_indices, grid[1])
        rows.append(tile_row * grid[0] + row)
        cols.append(tile_col * grid[1] + col)
    newline_rows = _newline_rows(layout, grid, np.concatenate(rows), rule)
    rows.append(newline_rows)
    # Beyond the last column, so that sorting puts the newline after its row.
    cols.append(np.full(len(newline_rows), layout.tile_cols * grid[1]))

    newlines = np.broadcast_to(newline, (len(newline_rows), len(newline)))
    image = np.concatenate([*(tile.embeds for tile in rest), newlines])
    order = np.lexsort((np.concatenate(cols), np.concatenate(rows)))
    return np.concatenate([base.embeds, image[order]])


def _interpolated_view(
    layout: TileLayout,
    grid: tuple[int, int],
    tiles: Sequence[EncodedTile],
    newline: NDArray[np.float32],
    rule: NewlineRule,
    size: tuple[int, int],
    max_cells: int | None,
) -> NDArray[np.float32]:
    places = np.full((layout.tile_rows * grid[0], layout.tile_cols * grid[1]), -1)
    num_placed = 0
    for index, tile in enumerate(tiles):
        tile_row, tile_col = divmod(index, layout.tile_cols)
        row, col = np.divmod(tile.patches.kept_indices, grid[1])
        places[tile_row * grid[0] + row, tile_col * grid[1] + col] = num_placed + np.arange(len(row))
        num_placed += len(row)
    cells = interpolated(places[layout.patch_rows(grid), layout.patch_cols(grid)], size)
    if max_cells is not None:
        patches = [tile.patches for tile in tiles]
        scores = [part.importance[part.kept_indices] for part in patches if part.importance is not None]
        cells = cells.best(np.concatenate(scores), max_cells)
    rows, cols = np.nonzero(cells.is_kept)
    newline_rows = {"kept-rows": np.unique(rows), "all": np.arange(size[0]), "none": np.arange(0)}[rule]
    newlines = np.broadcast_to(newline, (len(newline_rows), len(newline)))
    view = np.concatenate([cells.mean(np.concatenate([tile.embeds for tile in tiles])), newlines])
    # Beyond the last column, so that sorting puts a newline after its row.
    cols = np.concatenate([cols, np.full(len(newline_rows), size[1])])
    return view[np.lexsort((cols, np.concatenate([rows, newline_rows])))]


def _newline_rows(
    layout: TileLayout, grid: tuple[int, int], kept_rows: NDArray[np.int64], rule: NewlineRule
) -> NDArray[np.int64]:
    match rule:
        case "kept-rows":
            return np.unique(kept_rows)
        case "all":
            rows = layout.patch_rows(grid)
            return np.arange(rows.start, rows.stop)
        case "none":
            return np.arange(0)


def tile_budgets(
    importance: NDArray[np.float32], total: int, min_for_base: int, capacity: int | None = None
) -> NDArray[np.int64]:
    """Share one budget of tokens among the tiles of an image, in proportion to the importance mass of each.

    A tile's mass is the sum of its scores without the padding's. What a tile cannot take goes to the others, in
    the same proportion; where none of those has any mass, in proportion to what each can take. Fractions are
    settled by the largest remainder, ties by the lower tile. The arithmetic is exact, so equal scores give
    equal budgets on every machine. Newline tokens are not counted.

    Args:
        importance: [num_tiles, patches] float32, the base tile first; -inf at padding, else 0 or more.
        total: tokens to keep of the image.
        min_for_base: the base tile gets no fewer, or all that it can take.
        capacity: the most tokens that a tile can take, such as the graph's; None is all its patches.

    Returns:
        [num_tiles] int64. The sum is `total`, or all that the tiles can take where that is less.

    Raises:
        SpecError: `total` is less than `min_for_base`.
        ScoreError: a score is NaN, +inf or negative.
    """
    if total < min_for_base:
        raise SpecError(
            f"an image cannot keep {total} tokens in total: its base tile alone keeps {min_for_base} or more; "
            f"use at least {min_for_base}"
        )
    is_image = importance != -np.inf
    if not (np.isfinite(importance) & (importance >= 0))[is_image].all():
        raise ScoreError("importance holds NaN, +inf or a negative score; expected 0 or more, and -inf at padding")
    if capacity is None:
        capacity = importance.shape[1]
    most = np.minimum(is_image.sum(axis=1), capacity).tolist()
    masses = [Fraction(math.fsum(scores[kept])) for scores, kept in zip(importance, is_image, strict=True)]
    total, least = min(total, sum(most)), min(min_for_base, most[0])

    shares = _shares(masses, most, total)
    if shares[0] < least:
        shares = [Fraction(least), *_shares(masses[1:], most[1:], total - least)]
    budgets = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda tile: budgets[tile] - shares[tile])
    for tile in by_remainder[: total - sum(budgets)]:
        budgets[tile] += 1
    return np.array(budgets, np.int64)


def _shares(weights: Sequence[Fraction], most: Sequence[int], total: int) -> list[Fraction]:
    """Share out `total`, at most the sum of `most`, in proportion to the weights, to none more than its most."""
    shares = [Fraction(0)] * len(weights)
    free = list(range(len(weights)))
    while free:
        if not any(weights[tile] for tile in free):
            weights = [Fraction(limit) for limit in most]
        weight = sum(weights[tile] for tile in free)
        full = [tile for tile in free if total * weights[tile] >= most[tile] * weight]
        if not full:
            for tile in free:
                shares[tile] = total * weights[tile] / weight
            break
        for tile in full:
            shares[tile] = Fraction(most[tile])
            total -= most[tile]
            free.remove(tile)
    return shares


def trim_tile(tile: EncodedTile, keep: int, grid: tuple[int, int], spec: PruningSpec) -> EncodedTile:
    """Keep fewer tokens of a tile that is pruned already: those that the rule keeps with this `keep`.

    The order in which the rule keeps patches does not depend on `keep`, so fewer are a subset of more, and the
    tile need not be encoded again.

    Args:
        tile: pruned by `spec`, with its scores.
        keep: tokens to keep; 0 gives an empty tile.
        grid: rows and columns of patches in one tile.
        spec: what the tile was pruned with; only its `keep` is replaced.

    Raises:
        EngineError: the tile was pruned by another rule, or keeps fewer.
    """
    assert tile.patches.importance is not None, "an unpruned tile has no scores"
    assert keep >= 0, "a count"
    assert len(tile.patches.kept_indices) == len(tile.embeds), "trimming knows no prefix tokens"
    kept = np.zeros(0, np.int64)
    if keep:
        kept = select(tile.patches.importance[None], grid, replace(spec, keep=keep)).indices[0]
    places = np.flatnonzero(np.isin(tile.patches.kept_indices, kept))
    if len(places) != keep:
        raise EngineError(
            f"the vision graph kept {len(places)} of the {keep} patches that the bundle's rule keeps by its scores; "
            "export the bundle again"
        )
    return EncodedTile(tile.embeds[places], KeptPatches(tile.patches.kept_indices[places], tile.patches.importance))
