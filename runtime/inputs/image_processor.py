"""The preprocessing that a checkpoint expects of an image that is one tile: from RGB images to pixel values."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hivtp.runtime.inputs.images import MAX_IMAGE_PIXELS
from hivtp.runtime.inputs.resizing import MAX_SIDE, Size, is_height_width, is_size, read_size, resized_size
from hivtp_ops.errors import CheckpointError, ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

CLIP_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor")
LLAVA_TYPES = ("LlavaImageProcessor",)
SIGLIP_TYPES = ("SiglipImageProcessor",)
TYPES = CLIP_TYPES + LLAVA_TYPES + SIGLIP_TYPES
# Where SigLIP's defaults differ from those of the others.
SIGLIP_DEFAULTS: Mapping[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
# Of what pixels are computed with, so that float32 holds them.
MAX_VALUE = 1e6


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """What transformers' image processors of CLIP, LLaVA and SigLIP (PIL backend) do to an image.

    The fields bear the names of `preprocessor_config.json`, and the defaults are those of the first two.
    The steps, in order: pad, resize, crop, rescale, normalize.

    Args:
        do_convert_rgb: put a white ground under what is transparent, as where a file names one transparent colour.
        do_pad: pad to a square with the mean colour, the image in the middle (LlavaImageProcessor only).
        do_resize: whether to resize.
        size: what to resize to; see Size.
        resample: the filter, a number of `PIL.Image.Resampling`.
        do_center_crop: whether to cut out the middle; where the image is smaller, black surrounds it.
        crop_size: (height, width) of the crop in pixels.
        do_rescale: whether to multiply the values 0..255 by `rescale_factor`.
        rescale_factor: see `do_rescale`.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: one number for each of red, green and blue; also the colour of the padding.
        image_std: one number for each of red, green and blue.

    Raises:
        CheckpointError: if a value cannot work, or images of different shapes would come out in different
            sizes: a vision graph takes one.
    """

    do_convert_rgb: bool = True
    do_pad: bool = False
    do_resize: bool = True
    size: Size = 224
    resample: int = Image.Resampling.BICUBIC.value
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name in ("do_convert_rgb", "do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            self._expect(name, "true or false", isinstance(getattr(self, name), bool))
        sides = f"the shorter side or (height, width) in pixels, up to {MAX_SIDE}"
        self._expect("size", sides, is_size(self.size))
        self._expect("crop_size", f"(height, width) in pixels, up to {MAX_SIDE}", is_height_width(self.crop_size))
        filters = [resample.value for resample in Image.Resampling]
        self._expect("resample", f"one of Pillow's filters {filters}", self.resample in filters)
        self._expect("rescale_factor", "a number", _is_number(self.rescale_factor))
        self._expect("image_mean", "three numbers", _is_rgb(self.image_mean))
        has_std = _is_rgb(self.image_std) and min(map(abs, self.image_std)) >= 1 / MAX_VALUE
        self._expect("image_std", "three numbers, none 0", has_std)
        is_fixed = isinstance(self.size, tuple) or (self.do_pad and isinstance(self.size, int))
        if not (self.do_center_crop or (self.do_resize and is_fixed)):
            raise CheckpointError(
                "image preprocessing: the output would vary in size, and a vision graph takes one size; "
                "expected do_center_crop, or do_resize with do_pad or with a size of height and width"
            )

    def _expect(self, name: str, expected: str, is_met: bool) -> None:
        if not is_met:
            raise CheckpointError(f"image preprocessing: {name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Read a checkpoint's `preprocessor_config.json`.

        In a checkpoint of transformers 5 it is the "image_processor" of `processor_config.json`. What is
        absent takes its default and a null step is off, as in transformers; keys that do not bear on the
        pixels are ignored. `size` may be an int, [height, width], {"height", "width"}, {"shortest_edge"} with or
        without "longest_edge", or {"max_height", "max_width"}; `crop_size` one of the first three.

        Raises:
            CheckpointError: if the type of processor is not supported, or a value is not.
        """
        found = config.get("image_processor_type") or config.get("feature_extractor_type")
        kind = str(found).removesuffix("Fast").removesuffix("Pil")
        if kind not in TYPES:
            raise CheckpointError(
                f"the image processor of this checkpoint is {found!r}; supported are {', '.join(TYPES)}, and their "
                "Fast and Pil forms"
            )
        defaults = SIGLIP_DEFAULTS if kind in SIGLIP_TYPES else {}
        settings: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            default = defaults.get(field.name, field.default)
            value = config.get(field.name, default)
            if value is None:
                value = False if field.name.startswith("do_") else default
            settings[field.name] = value
        if kind not in LLAVA_TYPES:
            # Theirs evens out a batch, and one size leaves nothing to even out.
            settings["do_pad"] = False
        settings["size"] = read_size(settings["size"], is_square=bool(config.get("default_to_square")))
        settings["crop_size"] = read_size(settings["crop_size"], is_square=True)
        for name in ("image_mean", "image_std"):
            value = settings[name]
            settings[name] = (value,) * 3 if _is_number(value) else tuple(value) if isinstance(value, list) else value
        return cls(**settings)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what comes out, whatever goes in."""
        if self.do_center_crop:
            return self.crop_size
        assert isinstance(self.size, int | tuple), "others come out in a size that varies"
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def __call__(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Turn images into the vision graph's input.

        Args:
            images: as `load_image` gives them.

        Returns:
            [num_images, 3, height, width] float32, equal to what the checkpoint's own processor makes.

        Raises:
            ImageError: if an image is so long and thin that resizing or padding would blow it up beyond
                `MAX_IMAGE_PIXELS`.
        """
        pixel_values = np.empty((len(images), 3, *self.output_size), np.float32)
        for image, channels in zip(images, pixel_values, strict=True):
            pixels = np.asarray(self.frame(image))
            for channel, values in enumerate(self._values):
                # "clip" never clips a uint8 index; it spares numpy a checked copy.
                np.take(values, pixels[:, :, channel], out=channels[channel], mode="clip")
        return pixel_values

    def frame(self, image: Image.Image) -> Image.Image:
        """Give the image that the model sees: RGB, of `output_size`, before rescaling and normalising."""
        image = _flatten(image) if self.do_convert_rgb else image.convert("RGB")
        if self.do_pad:
            image = self._pad(image)
        if self.do_resize:
            height, width = resized_size((image.height, image.width), self.size)
            if not isinstance(self.size, tuple):
                _check_num_pixels(image, height, width)
            image = image.resize((width, height), self.resample)
        if self.do_center_crop:
            height, width = self.crop_size
            left, top = (image.width - width) // 2, (image.height - height) // 2
            # Pillow fills what lies outside of the image with 0, which is black, as the original does.
            image = image.crop((left, top, left + width, top + height))
        return image

    def region(self, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Tell which part of an image the output shows.

        Args:
            image_size: (height, width) in pixels.

        Returns:
            (left, top, right, bottom) in pixels of the image; where the output shows padding it lies outside.
        """
        height, width = image_size
        left, top = 0, 0
        if self.do_pad:
            side = max(image_size)
            left, top, height, width = -((side - width) // 2), -((side - height) // 2), side, side
        rows, cols = resized_size((height, width), self.size) if self.do_resize else (height, width)
        first_row, first_col, num_rows, num_cols = 0, 0, rows, cols
        if self.do_center_crop:
            num_rows, num_cols = self.crop_size
            first_row, first_col = (rows - num_rows) // 2, (cols - num_cols) // 2
        down, across = height / rows, width / cols
        return (
            left + first_col * across,
            top + first_row * down,
            left + (first_col + num_cols) * across,
            top + (first_row + num_rows) * down,
        )

    def _pad(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        _check_num_pixels(image, side, side)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    @cached_property
    def _values(self) -> npt.NDArray[np.float32]:
        """[3, 256] float32: what each level of each channel becomes, by the original's own arithmetic."""
        values = np.arange(256, dtype=np.float32)[None]
        if self.do_rescale:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean, std = np.array([self.image_mean, self.image_std], np.float32)[:, :, None]
            values = (values - mean) / std
        return np.broadcast_to(values, (3, 256))


def _flatten(image: Image.Image) -> Image.Image:
    # transformers puts a white ground under what is transparent. `load_image` drops an alpha channel before
    # that, as its original does, but a file's single transparent colour is still in `info`, and counts.
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_num_pixels(image: Image.Image, height: int, width: int) -> None:
    if not 0 < height * width <= MAX_IMAGE_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too long and thin: resizing or padding it "
            f"for the model would make {width} x {height} pixels; crop it first"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_VALUE


def _is_rgb(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))
