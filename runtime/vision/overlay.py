"""A drawing of what pruning kept: kept patches clear and outlined, dropped ones dark and grey."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hivtp_ops import select
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from hivtp.runtime.vision.encoder import TileFrame
    from hivtp.runtime.vision.stage import KeptPatches
    from hivtp_ops import PruningSpec

MIN_SIDE_PIXELS = 672
LEGEND_HEIGHT_PIXELS = 44
DROPPED_BRIGHTNESS = 0.35

BACKGROUND = (18, 20, 24)
TEXT = (236, 238, 241)
KEPT = (255, 255, 255)
GLOBAL = (255, 64, 168)
LOCAL = (0, 208, 255)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The patches that share a colour."""

    label: str
    colour: tuple[int, int, int]
    indices: npt.NDArray[np.integer]


def draw_overlay(
    frame: Image.Image,
    grid: tuple[int, int],
    kept_indices: npt.NDArray[np.integer],
    is_global: npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """Draw the image as the model saw it and mark the patches that pruning kept.

    Args:
        frame: RGB, after resizing and cropping, before normalising.
        grid: (rows, cols) of patches.
        kept_indices: [num] integers, raster indices into the grid; -1 stands for no patch.
        is_global: [num] bool, which of them the global stage kept; given, each stage has its colour.

    Returns:
        RGB: the image, its shorter side at least 672 pixels, above a legend.

    Raises:
        ImageError: if an index lies outside of the grid, or a shape or dtype is not as above.
    """
    stages = _stages(grid, np.asarray(kept_indices), is_global)
    image, patch_width, patch_height = _enlarge(frame, grid)

    is_kept = np.zeros(grid, np.uint8)
    for stage in stages:
        is_kept.flat[stage.indices] = 255
    dropped = ImageOps.grayscale(image).point(lambda level: level * DROPPED_BRIGHTNESS).convert("RGB")
    mask = Image.fromarray(is_kept).resize(image.size, Image.Resampling.NEAREST)
    image = Image.composite(image, dropped, mask)

    draw = ImageDraw.Draw(image)
    for stage in stages:
        for index in stage.indices.tolist():
            row, col = divmod(index, grid[1])
            left, top = col * patch_width, row * patch_height
            draw.rectangle((left, top, left + patch_width - 1, top + patch_height - 1), outline=stage.colour)

    overlay = Image.new("RGB", (image.width, image.height + LEGEND_HEIGHT_PIXELS), BACKGROUND)
    overlay.paste(image)
    _draw_legend(overlay, stages, num_patches=is_kept.size)
    return overlay


def draw_tiles(
    frames: Sequence[TileFrame], tiles: Sequence[KeptPatches], grid: tuple[int, int], spec: PruningSpec | None
) -> Image.Image:
    """Draw every frame of an image with what its tiles kept, side by side.

    Args:
        frames: the image as the model saw it, once for each way in which it was tiled.
        tiles: what each tile kept, in order.
        grid: rows and columns of patches in one tile.
        spec: what the tiles were pruned by, which tells the stages apart; None draws them alike.

    Returns:
        An RGB image.
    """
    overlays, start = [], 0
    for frame in frames:
        part = tiles[start : start + frame.tile_rows * frame.tile_cols]
        start += len(part)
        indices = np.concatenate([_on_frame(tile.kept_indices, place, frame, grid) for place, tile in enumerate(part)])
        flags = [flag for tile in part if (flag := is_of_global_stage(tile, grid, spec)) is not None]
        is_global = np.concatenate(flags) if flags else None
        overlays.append(
            draw_overlay(frame.image, (frame.tile_rows * grid[0], frame.tile_cols * grid[1]), indices, is_global)
        )
    height = max(overlay.height for overlay in overlays)
    sheet = Image.new("RGB", (sum(overlay.width for overlay in overlays), height), BACKGROUND)
    left = 0
    for overlay in overlays:
        sheet.paste(overlay, (left, 0))
        left += overlay.width
    return sheet


def _on_frame(
    indices: npt.NDArray[np.int64], place: int, frame: TileFrame, grid: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Raster indices in one tile as raster indices in the whole frame."""
    tile_row, tile_col = divmod(place, frame.tile_cols)
    rows, cols = np.divmod(indices, grid[1])
    return (tile_row * grid[0] + rows) * (frame.tile_cols * grid[1]) + tile_col * grid[1] + cols


def is_of_global_stage(
    tile: KeptPatches, grid: tuple[int, int], spec: PruningSpec | None
) -> npt.NDArray[np.bool_] | None:
    """Which patches of a tile the global stage kept, [num_kept_patches] bool; None where nothing is pruned."""
    if spec is None or tile.importance is None:
        return None
    selection = select(tile.importance[None], grid, spec)
    is_global = np.zeros(grid[0] * grid[1], np.bool_)
    is_global[selection.indices[0][selection.is_global[0]]] = True
    return is_global[tile.kept_indices]


def _stages(
    grid: tuple[int, int],
    kept_indices: npt.NDArray[np.integer],
    is_global: npt.NDArray[np.bool_] | None,
) -> list[_Stage]:
    num_patches = grid[0] * grid[1]
    if kept_indices.ndim != 1 or not np.issubdtype(kept_indices.dtype, np.integer):
        raise ImageError(
            f"kept_indices are of shape {list(kept_indices.shape)} and dtype {kept_indices.dtype}; "
            "expected [num] integers, those of one image"
        )
    is_outside = (kept_indices < -1) | (kept_indices >= num_patches)
    if is_outside.any():
        raise ImageError(
            f"kept_indices hold {kept_indices[is_outside][0]}; expected -1 or 0..{num_patches - 1}, "
            f"as the grid has {grid[0]} x {grid[1]} patches"
        )
    is_patch = kept_indices >= 0
    if is_global is None:
        return [_Stage("kept", KEPT, kept_indices[is_patch])]
    if is_global.shape != kept_indices.shape or is_global.dtype != np.bool_:
        raise ImageError(
            f"is_global is of shape {list(is_global.shape)} and dtype {is_global.dtype}; "
            f"expected bool of the shape of kept_indices, {list(kept_indices.shape)}"
        )
    return [
        _Stage("global stage", GLOBAL, kept_indices[is_patch & is_global]),
        _Stage("local stage", LOCAL, kept_indices[is_patch & ~is_global]),
    ]


def _enlarge(frame: Image.Image, grid: tuple[int, int]) -> tuple[Image.Image, int, int]:
    rows, cols = grid
    if not (0 < rows <= frame.height and 0 < cols <= frame.width):
        raise ImageError(f"a grid of {rows} x {cols} patches does not fit {frame.width} x {frame.height} pixels")
    patch_width, patch_height = frame.width // cols, frame.height // rows
    # An encoder whose patches do not divide the image never sees what is over at the right and the bottom.
    seen = frame.crop((0, 0, cols * patch_width, rows * patch_height))
    scale = -(-MIN_SIDE_PIXELS // min(seen.size))
    enlarged = seen.resize((seen.width * scale, seen.height * scale), Image.Resampling.BICUBIC)
    return enlarged, patch_width * scale, patch_height * scale


def _draw_legend(overlay: Image.Image, stages: list[_Stage], num_patches: int) -> None:
    draw = ImageDraw.Draw(overlay)
    font = ImageFont.load_default(size=18)
    x, y = 14.0, overlay.height - LEGEND_HEIGHT_PIXELS // 2

    num_kept = sum(stage.indices.size for stage in stages)
    text = f"{num_kept} of {num_patches} patches kept"
    draw.text((x, y), text, TEXT, font, anchor="lm")
    if len(stages) == 1:
        return
    for stage in stages:
        x += draw.textlength(text, font) + 32
        text = f"{stage.indices.size} {stage.label}"
        draw.rectangle((x, y - 9, x + 18, y + 9), outline=stage.colour, width=3)
        x += 28
        draw.text((x, y), text, TEXT, font, anchor="lm")
