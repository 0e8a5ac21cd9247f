"""Where the tokens of the unpruned model come from, image by image, and which of them stay; in PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

    from hivtp.runtime.inputs.tile_layout import TileLayout
    from hivtp.runtime.vision.packing import NewlineRule

# Stands where the unpruned model has its `image_newline`, which is a token of no tile.
NEWLINE = -1


def image_blocks(layouts: Sequence[TileLayout], grid: tuple[int, int]) -> list[NDArray[np.int64]]:
    """The unpruned tokens of LLaVA-NeXT images: for each, its base tile and then its unpadded view.

    A block [rows, tokens] holds rows of the tower's output [tiles * (1 + patches)], or NEWLINE.
    """
    (rows, cols), blocks, start = grid, [], 0
    for layout in layouts:
        shape = layout.num_tiles, 1 + rows * cols
        base, *tiles = np.arange(start, start + math.prod(shape)).reshape(shape)[:, 1:]
        view = np.reshape(tiles, (layout.tile_rows, layout.tile_cols, rows, cols)).swapaxes(1, 2)
        view = view.reshape(layout.tile_rows * rows, -1)[layout.patch_rows(grid), layout.patch_cols(grid)]
        blocks += [base[None], np.pad(view, ((0, 0), (0, 1)), constant_values=NEWLINE)]
        start += math.prod(shape)
    return blocks


def keep_tokens(block: NDArray[np.int64], stays: NDArray[np.bool_], rule: NewlineRule) -> NDArray[np.bool_]:
    """Which tokens of a block stay, given that of every row of the tower's output."""
    is_newline = block == NEWLINE
    is_kept: NDArray[np.bool_] = stays[block] & ~is_newline
    if rule != "none":
        is_kept |= is_newline & (is_kept.any(axis=1, keepdims=True) | (rule == "all"))
    return is_kept


@dataclass(frozen=True)
class ProjectedTokens:
    """The tokens that stay, after the projector.

    Attributes:
        embeds: [num_kept_tokens, hidden], block after block.
        is_kept: for each block [rows, tokens] bool, which of its tokens those are.
    """

    embeds: torch.Tensor
    is_kept: list[NDArray[np.bool_]]


def is_image_patch(blocks: Sequence[NDArray[np.int64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Tell the patches of the images from those of the padding.

    Args:
        blocks: of all images.
        shape: tiles, and tokens of a tile with its CLS.

    Returns:
        [tiles, patches] bool.
    """
    is_image = np.zeros(shape, np.bool_)
    for block in blocks:
        is_image.ravel()[block[block != NEWLINE]] = True
    return is_image[:, 1:]


def project_kept(
    features: torch.Tensor,
    kept_indices: torch.Tensor,
    blocks: Sequence[NDArray[np.int64]],
    rule: NewlineRule,
    projector: Callable[[torch.Tensor], torch.Tensor],
    newline: torch.Tensor | None = None,
) -> ProjectedTokens:
    """Put the tokens that stay through the projector, which sees no others; waits for the device once.

    Args:
        features: [tiles, 1 + patches, width], the CLS first; it stays wherever a block has it.
        kept_indices: [tiles, capacity] int64, as `hivtp_ops.torch_op.hierarchical_prune` gives them.
        blocks: of all images, see `image_blocks`.
        rule: which rows keep their newline.
        projector: [tokens, width] to [tokens, hidden].
        newline: [hidden], where the blocks have newlines.
    """
    import torch

    # Patch i is token i + 1, so that no patch (-1) falls on the CLS.
    scattered = torch.zeros(features.shape[:2], dtype=torch.bool, device=kept_indices.device)
    stays = scattered.scatter_(1, kept_indices + 1, True).cpu().numpy()
    stays[:, 0] = True
    flags = [keep_tokens(block, stays.ravel(), rule) for block in blocks]
    tokens = np.concatenate([block[is_kept] for block, is_kept in zip(blocks, flags, strict=True)])
    is_patch = torch.from_numpy(tokens != NEWLINE).to(features.device)
    rows = torch.from_numpy(tokens[tokens != NEWLINE]).to(features.device)
    embeds = projector(features.flatten(0, 1)[rows])
    if len(rows) < len(tokens):
        assert newline is not None, "images with newlines have an embedding for them"
        newlines = newline.to(embeds).expand(len(tokens), -1)
        embeds = newlines.masked_scatter(is_patch[:, None].to(embeds.device), embeds)
    return ProjectedTokens(embeds, flags)
