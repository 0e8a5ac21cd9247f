"""Where the tokens of the unpruned model come from, image by image, and which of them stay; in PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp.runtime.vision.interpolation import interpolated, view_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout
    from hivtp.runtime.vision.packing import NewlineRule

# Stands where the unpruned model has its `image_newline`, which is a token of no tile.
NEWLINE = -1


@dataclass(frozen=True)
class Block:
    """Tokens of an image that lie together.

    Attributes:
        rows: [rows, tokens] int64, rows of the tower's output [tiles * (class tokens + patches)], or NEWLINE.
        size: rows and columns of cells to which they are interpolated, each row then followed by a newline; None where
            they are not.
    """

    rows: NDArray[np.int64]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class KeptBlock:
    """What is left of a block.

    Attributes:
        is_kept: [unpruned tokens] bool.
        rows: [kept rows] int64, rows of the tower's output.
        sources: [kept tokens, 1 or 4] int64, which of the kept rows a token is made of, or NEWLINE.
        weights: [kept tokens, 4] float32, the share of each; None where a token is made of one.
    """

    is_kept: NDArray[np.bool_]
    rows: NDArray[np.int64]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32] | None


@dataclass(frozen=True)
class ProjectedTokens:
    """The tokens that stay, after the projector.

    Attributes:
        embeds: [num_kept_tokens, hidden], block after block.
        is_kept: for each block [unpruned tokens] bool, which of its tokens those are.
    """

    embeds: torch.Tensor
    is_kept: list[NDArray[np.bool_]]


def image_blocks(
    layouts: Sequence[TileLayout], grid: tuple[int, int], num_class_tokens: int, max_view_tiles: int | None
) -> list[Block]:
    """The unpruned tokens of tiled images: for each, its base tile and then its unpadded view.

    Args:
        layouts: how the images lie on their tiles.
        grid: rows and columns of patches in a tile.
        num_class_tokens: of the tower.
        max_view_tiles: see `view_size`.
    """
    (rows, cols), blocks, start = grid, [], 0
    for layout in layouts:
        shape = layout.num_tiles, num_class_tokens + rows * cols
        base, *tiles = np.arange(start, start + math.prod(shape)).reshape(shape)[:, num_class_tokens:]
        start += math.prod(shape)
        if not tiles:
            blocks.append(Block(np.append(base, NEWLINE)[None]))
            continue
        view = np.reshape(tiles, (layout.tile_rows, layout.tile_cols, rows, cols)).swapaxes(1, 2)
        view = view.reshape(layout.tile_rows * rows, -1)[layout.patch_rows(grid), layout.patch_cols(grid)]
        size = view_size(layout, grid, max_view_tiles)
        if size == view.shape:
            view_block = Block(np.pad(view, ((0, 0), (0, 1)), constant_values=NEWLINE))
        else:
            view_block = Block(view, size)
        blocks += [Block(base[None]), view_block]
    return blocks


def is_image_patch(blocks: Sequence[Block], shape: tuple[int, int], num_class_tokens: int) -> NDArray[np.bool_]:
    """Tell the patches of the images from those of the padding.

    Args:
        blocks: of all images.
        shape: tiles, and tokens of a tile with its class tokens.
        num_class_tokens: of the tower.

    Returns:
        [tiles, patches] bool.
    """
    is_image = np.zeros(shape, np.bool_)
    for block in blocks:
        is_image.ravel()[block.rows[block.rows != NEWLINE]] = True
    return is_image[:, num_class_tokens:]


def project_kept(
    features: torch.Tensor,
    kept_indices: torch.Tensor,
    blocks: Sequence[Block],
    rule: NewlineRule,
    projector: Callable[[torch.Tensor], torch.Tensor],
    newline: torch.Tensor | None,
    num_class_tokens: int,
) -> ProjectedTokens:
    """Put the tokens that stay through the projector, which sees no others; waits for the device once.

    Args:
        features: [tiles, class tokens + patches, width]; a class token stays wherever a block has it.
        kept_indices: [tiles, capacity] int64, as `hivtp_ops.torch_op.hierarchical_prune` gives them.
        blocks: of all images, see `image_blocks`.
        rule: which rows keep their newline.
        projector: [tokens, width] to [tokens, hidden].
        newline: [hidden], where the blocks have newlines.
        num_class_tokens: of the tower.
    """
    import torch

    num_patches = features.shape[1] - num_class_tokens
    # Column i + 1 is patch i, so that no patch (-1) falls on the first; a CLS stays wherever a block has it.
    scattered = torch.zeros((len(features), 1 + num_patches), dtype=torch.bool, device=kept_indices.device)
    scattered.scatter_(1, kept_indices + 1, True)[:, 0] = True
    stays = scattered[:, 1 - num_class_tokens :].cpu().numpy()
    kept = [keep_block(block, stays.ravel(), rule) for block in blocks]
    rows = np.concatenate([block.rows for block in kept])
    projected = projector(features.flatten(0, 1)[torch.from_numpy(rows).to(features.device)])
    if newline is not None:
        # NEWLINE is the last.
        projected = torch.cat([projected, newline.to(projected)[None]])
    embeds, start = [], 0
    for block in kept:
        sources = np.where(block.sources == NEWLINE, len(rows), block.sources + start)
        parts = projected[torch.from_numpy(sources).to(projected.device)]
        if block.weights is None:
            embeds.append(parts[:, 0])
        else:
            embeds.append((parts * torch.from_numpy(block.weights).to(parts)[..., None]).sum(dim=1))
        start += len(block.rows)
    return ProjectedTokens(torch.cat(embeds), [block.is_kept for block in kept])


def keep_block(block: Block, stays: NDArray[np.bool_], rule: NewlineRule) -> KeptBlock:
    """What is left of a block, given which rows of the tower's output stay."""
    if block.size is not None:
        return _keep_interpolated(block.rows, block.size, stays, rule)
    is_newline = block.rows == NEWLINE
    is_kept = _with_newlines(stays[block.rows] & ~is_newline, is_newline, rule)
    tokens = block.rows[is_kept]
    is_row = tokens != NEWLINE
    sources = np.where(is_row, np.cumsum(is_row) - 1, NEWLINE)
    return KeptBlock(is_kept.ravel(), tokens[is_row], sources[:, None], None)


def _keep_interpolated(
    rows: NDArray[np.int64], size: tuple[int, int], stays: NDArray[np.bool_], rule: NewlineRule
) -> KeptBlock:
    is_row = stays[rows]
    places = np.where(is_row, np.cumsum(is_row).reshape(rows.shape) - 1, -1)
    cells = interpolated(places, size)
    is_newline = np.zeros((size[0], size[1] + 1), np.bool_)
    is_newline[:, -1] = True
    is_kept = _with_newlines(np.pad(cells.is_kept, ((0, 0), (0, 1))), is_newline, rule)
    is_cell = ~is_newline[is_kept]
    sources = np.full((len(is_cell), 4), NEWLINE)
    sources[is_cell] = cells.sources
    weights = np.full((len(is_cell), 4), 0.25, np.float32)
    weights[is_cell] = cells.weights
    return KeptBlock(is_kept.ravel(), rows[is_row], sources, weights)


def _with_newlines(is_kept: NDArray[np.bool_], is_newline: NDArray[np.bool_], rule: NewlineRule) -> NDArray[np.bool_]:
    if rule == "none":
        return is_kept
    return is_kept | (is_newline & (is_kept.any(axis=1, keepdims=True) | (rule == "all")))
