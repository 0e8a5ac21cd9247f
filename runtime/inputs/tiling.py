"""How an image of LLaVA-NeXT or LLaVA-OneVision becomes tiles: the whole made square, then the tiles of a grid."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL import Image

from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import MAX_IMAGE_PIXELS
from hivtp.runtime.inputs.prepared_image import PreparedImage
from hivtp.runtime.inputs.tile_layout import TileLayout
from hivtp_ops.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hivtp.runtime.inputs.resizing import Size


NEXT_TYPE, ONEVISION_TYPE = "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"

# In pixels; more than any grid of tiles that `max_tiles` lets through.
MAX_PINPOINT = 10**6

# What transformers' class has where a config names none; llava-v1.6 has the same five.
DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# The same for LLaVA-OneVision: every grid up to 6 x 6.
ONEVISION_PINPOINTS = tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7))


@dataclass(frozen=True)
class Tiler:
    """What transformers' image processors of LLaVA-NeXT and LLaVA-OneVision (PIL backend) do to an image.

    Args:
        image_processor: what is done to each tile; its `size` is also that of the base tile before the crop.
        pinpoints: the (height, width) in pixels among which the larger view of an image may choose.
        tile_size: side of a tile in pixels.
        max_tiles: an image that needs more tiles than this, the base tile included, is refused.
        cuts_several: whether images are cut where a prompt has several. In LLaVA-OneVision they are not: each is then
            padded to a square, and is a base tile alone.

    Raises:
        CheckpointError: the pinpoints are not multiples of the tile size, or tiles would come out in another size.
    """

    image_processor: ImageProcessor
    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    max_tiles: int
    cuts_several: bool = True

    def __post_init__(self) -> None:
        side = self.tile_size
        if not isinstance(self.image_processor.size, tuple) or self.image_processor.output_size != (side, side):
            raise CheckpointError(
                f"image preprocessing: tiles of {side} x {side} pixels are cut, and size={self.image_processor.size} "
                f"makes {self.image_processor.output_size} of each; expected a size of (height, width), and tiles "
                "that come out as they were cut"
            )
        if not isinstance(self.pinpoints, tuple) or not self.pinpoints:
            raise CheckpointError(
                f"image preprocessing: image_grid_pinpoints is {self.pinpoints!r}; expected a list of one or more "
                "[height, width] in pixels"
            )
        for index, pinpoint in enumerate(self.pinpoints):
            if not _is_pinpoint(pinpoint, side):
                raise CheckpointError(
                    f"image preprocessing: image_grid_pinpoints[{index}] is {pinpoint!r}; expected "
                    f"[height, width] in pixels, both multiples of the tile size {side}"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_tiles: int) -> Tiler:
        """Read a checkpoint's `preprocessor_config.json`; see `ImageProcessor.from_config`.

        Args:
            config: the settings; what is absent or null takes the default of transformers.
            max_tiles: see the class.

        Raises:
            CheckpointError: the type of processor is not supported, or a value is not.
        """
        found = config.get("image_processor_type")
        kind = str(found).removesuffix("Fast").removesuffix("Pil")
        if kind not in (NEXT_TYPE, ONEVISION_TYPE):
            raise CheckpointError(
                f"the image processor of this checkpoint is {found!r}; supported for tiles are {NEXT_TYPE} and "
                f"{ONEVISION_TYPE}, and their Fast and Pil forms"
            )
        size = config.get("size")
        if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
            size = size["shortest_edge"]
        # Nothing but squares is resized by its shorter edge here, and do_pad evens out a batch, as CLIP's does.
        clip = {"image_processor_type": "CLIPImageProcessor", "size": size, "default_to_square": True}
        if kind == ONEVISION_TYPE:
            clip |= {"do_center_crop": config.get("do_center_crop") or False}
        processor = ImageProcessor.from_config({**config, **clip})
        pinpoints = config.get("image_grid_pinpoints")
        if pinpoints is None:
            pinpoints = DEFAULT_PINPOINTS if kind == NEXT_TYPE else ONEVISION_PINPOINTS
        if isinstance(pinpoints, list):
            pinpoints = tuple(tuple(pinpoint) if isinstance(pinpoint, list) else pinpoint for pinpoint in pinpoints)
        if kind == NEXT_TYPE:
            return cls(processor, pinpoints, processor.crop_size[0], max_tiles)
        return cls(processor, pinpoints, processor.output_size[0], max_tiles, cuts_several=False)

    def layout(self, image_size: tuple[int, int], num_images: int = 1) -> TileLayout:
        """Tell how an image of this (height, width) in pixels will lie on its tiles.

        Args:
            image_size: of the image.
            num_images: of the prompt.

        Raises:
            ImageError: it needs more than `max_tiles`.
        """
        if num_images > 1 and not self.cuts_several:
            return TileLayout(0, 0, image_size)
        layout = TileLayout.on(self.pinpoints, self.tile_size, image_size)
        if layout.num_tiles > self.max_tiles:
            raise ImageError(
                f"an image of {image_size[1]} x {image_size[0]} pixels becomes a base tile and "
                f"{layout.tile_rows} x {layout.tile_cols} more, {layout.num_tiles} tiles, and the limit is "
                f"{self.max_tiles}; scale it down, or raise max_tiles"
            )
        return layout

    def __call__(self, image: Image.Image, num_images: int = 1) -> PreparedImage:
        """Turn an image into the vision graph's input.

        Args:
            image: as `load_image` gives it.
            num_images: of the prompt.

        Raises:
            ImageError: the image needs too many tiles, or is so long and thin that resizing it would blow it up
                beyond `MAX_IMAGE_PIXELS`.
        """
        layout = self.layout((image.height, image.width), num_images)
        if layout.num_tiles == 1:
            return PreparedImage(self.alone([image]), layout)
        base, canvas = self.frames(image)
        side = self.tile_size
        corners = [(left, top) for top in range(0, canvas.height, side) for left in range(0, canvas.width, side)]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        return PreparedImage(self.image_processor([base, *tiles]), layout)

    @cached_property
    def alone(self) -> ImageProcessor:
        """What is done to an image that is not cut."""
        return dataclasses.replace(self.image_processor, do_pad=True)

    def frames(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Give the image as the base tile shows it, and as the tile grid does, padding included.

        Raises:
            ImageError: see `__call__`.
        """
        layout = self.layout((image.height, image.width))
        height, width = layout.tile_rows * self.tile_size, layout.tile_cols * self.tile_size
        view = self._resize(image, _fitted_size(layout.image_size, (height, width)))
        # The padding is black before normalising, not the mean colour: the model was trained on that.
        canvas = Image.new("RGB", (width, height))
        canvas.paste(view, ((width - view.width) // 2, (height - view.height) // 2))
        return self._resize(image, self.image_processor.size), canvas

    def region(self, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Tell where the tile grid lies on an image of this (height, width); see `ImageProcessor.region`."""
        layout = self.layout(image_size)
        height, width = layout.tile_rows * self.tile_size, layout.tile_cols * self.tile_size
        rows, cols = _fitted_size(image_size, (height, width))
        down, across = image_size[0] / rows, image_size[1] / cols
        left, top = -((width - cols) // 2) * across, -((height - rows) // 2) * down
        return left, top, left + width * across, top + height * down

    def _resize(self, image: Image.Image, size: Size) -> Image.Image:
        resizer = dataclasses.replace(
            self.image_processor, do_pad=False, do_resize=True, size=size, do_center_crop=False
        )
        # Pillow resizes across before it resizes down: what lies between is as wide as the output and as high as
        # the image.
        width = resizer.output_size[1]
        if width * image.height > MAX_IMAGE_PIXELS:
            raise ImageError(
                f"an image of {image.width} x {image.height} pixels is too long and thin: resizing it for the model "
                f"would make {width} x {image.height} pixels; crop it first"
            )
        return resizer.frame(image)


def _fitted_size(image_size: tuple[int, int], pinpoint: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image when it fills the pinpoint in one direction, rounded up in the other."""
    (image_height, image_width), (height, width) = image_size, pinpoint
    scale_across, scale_down = width / image_width, height / image_height
    if scale_across < scale_down:
        return min(math.ceil(image_height * scale_across), height), width
    return height, min(math.ceil(image_width * scale_down), width)


def _is_pinpoint(value: object, tile_size: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_length(n) and n % tile_size == 0 for n in value)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_PINPOINT
