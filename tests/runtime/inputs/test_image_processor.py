from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
from PIL import Image
from transformers import image_transforms
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import CheckpointError, ImageError

TOLERANCE = 1e-6

PHOTO_FOLDERS = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "camera.png",
    "logo.png",
    "china.jpg",
    "flower.jpg",
)

# As preprocessor_config.json of llava-hf/llava-1.5-7b-hf has it.
LLAVA_15 = {
    "_valid_processor_keys": ["images", "do_resize", "size", "return_tensors"],
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
# As transformers 4.2x wrote it for openai/clip-vit-large-patch14-336.
CLIP_OLD = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}
CLIP = {"image_processor_type": "CLIPImageProcessor"}
LLAVA = {"image_processor_type": "LlavaImageProcessor"}

CONFIGS = {
    "llava 1.5": LLAVA_15,
    "old clip": CLIP_OLD,
    "clip defaults": CLIP,
    "llava defaults": LLAVA,
    "null steps are off": CLIP | {"do_resize": None, "size": None, "do_normalize": None, "image_mean": None},
    "llava fast, padded": LLAVA_15 | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True},
    "llava padded, no crop": LLAVA | {"do_pad": True, "do_center_crop": False, "size": {"shortest_edge": 336}},
    "llava padded, odd": LLAVA | {"do_pad": True, "size": 57, "crop_size": 56},
    "clip ignores do_pad": LLAVA_15 | {"do_pad": True},
    "stretched to height and width": CLIP | {"size": {"height": 98, "width": 126}, "do_center_crop": False},
    "size as a list": CLIP | {"size": [98, 126], "crop_size": [84, 112]},
    "int size made square": CLIP | {"size": 98, "default_to_square": True, "do_center_crop": False},
    "odd crop": CLIP | {"size": 100, "crop_size": {"height": 97, "width": 99}},
    "crop larger than the image": CLIP | {"size": 100, "crop_size": {"height": 151, "width": 140}},
    "both edges bounded": CLIP | {"size": {"shortest_edge": 100, "longest_edge": 130}, "crop_size": 97},
    "longer edge far away": CLIP | {"size": {"shortest_edge": 100, "longest_edge": 5000}, "crop_size": 97},
    "within a rectangle": CLIP | {"size": {"max_height": 100, "max_width": 130}, "crop_size": 97},
    "llava within a rectangle": LLAVA | {"size": {"max_height": 99, "max_width": 30}, "crop_size": 56},
    "llava padded, both edges bounded": LLAVA | {"do_pad": True, "size": {"shortest_edge": 80, "longest_edge": 70}},
    "crop without resize": CLIP | {"do_resize": False, "crop_size": 336},
    "bilinear": LLAVA_15 | {"resample": 2},
    "lanczos": LLAVA_15 | {"resample": 1},
    "no normalize": LLAVA_15 | {"do_normalize": False},
    "no rescale": LLAVA_15 | {"do_rescale": False},
    "neither": LLAVA_15 | {"do_rescale": False, "do_normalize": False},
    "other numbers": CLIP | {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 1.1], "image_std": [0.5, 1, 2]},
    "siglip defaults": {"image_processor_type": "SiglipImageProcessor"},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3},
    "siglip, crop": {"image_processor_type": "SiglipImageProcessorFast", "size": 100, "do_convert_rgb": None}
    | {"default_to_square": True, "image_mean": 0.4},
    "one mean for all": CLIP | {"image_mean": 0.5, "image_std": 0.25},
}


def photo_path(name: str) -> Path:
    return next(folder / name for folder in PHOTO_FOLDERS if (folder / name).exists())


@cache
def photo(name: str) -> Image.Image:
    return load_image(photo_path(name))


def original(config: dict) -> CLIPImageProcessorPil | LlavaImageProcessorPil | SiglipImageProcessorPil:
    kind = config.get("image_processor_type", config.get("feature_extractor_type"))
    if kind.startswith("Siglip"):
        return SiglipImageProcessorPil.from_dict(config)
    return (LlavaImageProcessorPil if kind.startswith("Llava") else CLIPImageProcessorPil).from_dict(config)


def expected_values(config: dict, images: list) -> np.ndarray:
    return np.stack(original(config)(images)["pixel_values"])


def assert_equal(values: np.ndarray, expected: np.ndarray) -> None:
    assert values.dtype == np.float32
    assert values.shape == expected.shape
    assert np.abs(values - expected.astype(np.float32)).max() <= TOLERANCE


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("config", ["llava 1.5", "llava fast, padded"])
def test_photographs_equal_the_original(name, config):
    path = str(photo_path(name))
    processor = ImageProcessor.from_config(CONFIGS[config])
    assert_equal(processor([load_image(path)]), expected_values(CONFIGS[config], [path]))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_form_of_config_equals_the_original(config):
    images = [
        photo("chelsea.png"),
        photo("astronaut.png"),
        photo("rocket.jpg").transpose(Image.Transpose.ROTATE_90),
    ]
    processor = ImageProcessor.from_config(CONFIGS[config])
    values = processor(images)
    assert values.shape == (3, 3, *processor.output_size)
    assert_equal(values, expected_values(CONFIGS[config], images))


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (2, 37), (1000, 30), (31, 999), (336, 336), (337, 335), (641, 480)])
@pytest.mark.parametrize("config", ["llava 1.5", "llava fast, padded", "crop larger than the image"])
def test_odd_aspect_ratios_equal_the_original(size, config):
    image = photo("china.jpg").resize(size)
    assert_equal(ImageProcessor.from_config(CONFIGS[config])([image]), expected_values(CONFIGS[config], [image]))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    "grey.png": lambda image, path: save(image.convert("L"), path),
    "bits.png": lambda image, path: save(image.convert("1"), path),
    "palette.png": lambda image, path: save(image.quantize(64), path),
    "alpha.png": lambda image, path: save(with_alpha(image), path),
    "grey_alpha.png": lambda image, path: save(with_alpha(image).convert("LA"), path),
    "cmyk.jpg": lambda image, path: save(image.convert("CMYK"), path),
    "exif.jpg": lambda image, path: save(image, path, exif=rotated_exif()),
    "animated.gif": lambda image, path: save(image, path, save_all=True, append_images=[image.rotate(90)]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_equals_the_original(name, tmp_path):
    path = FILES[name](photo("chelsea.png"), tmp_path / name)
    values = ImageProcessor.from_config(LLAVA_15)([load_image(path)])
    assert_equal(values, expected_values(LLAVA_15, [str(path)]))


original_flattens = pytest.mark.skipif(
    "return_numpy" not in inspect.signature(image_transforms.convert_to_rgb).parameters,
    reason="this version of transformers drops transparency instead of putting white under it",
)


@original_flattens
@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_file_with_one_transparent_colour_equals_the_original(mode, tmp_path):
    image = photo("chelsea.png").convert(mode)
    path = save(image, tmp_path / "transparent.png", transparency=image.getpixel((100, 100)))
    values = ImageProcessor.from_config(LLAVA_15)([load_image(path)])
    assert_equal(values, expected_values(LLAVA_15, [str(path)]))


@original_flattens
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_images_of_other_modes_equal_the_original(mode):
    image = with_alpha(photo("chelsea.png")).convert(mode)
    assert_equal(ImageProcessor.from_config(LLAVA_15)([image]), expected_values(LLAVA_15, [image]))


def test_the_default_settings_are_those_of_the_original():
    for kind in (CLIPImageProcessorPil, LlavaImageProcessorPil):
        assert ImageProcessor.from_config(json.loads(kind().to_json_string())) == ImageProcessor()


def test_each_image_of_a_batch_is_what_it_is_alone():
    images = [photo("chelsea.png"), photo("rocket.jpg")]
    processor = ImageProcessor.from_config(LLAVA_15)
    np.testing.assert_array_equal(processor(images), np.concatenate([processor([image]) for image in images]))
    assert processor([]).shape == (0, 3, 336, 336)


def test_the_images_given_are_not_changed():
    image = photo("chelsea.png")
    before = np.array(image)
    ImageProcessor.from_config(CONFIGS["llava fast, padded"])([image])
    np.testing.assert_array_equal(np.asarray(image), before)


def test_frame_is_the_picture_behind_the_pixel_values():
    processor = ImageProcessor.from_config(LLAVA_15)
    frame = processor.frame(photo("chelsea.png"))
    assert (frame.mode, frame.size) == ("RGB", (336, 336))
    levels = (np.asarray(frame) / 255 - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(processor([photo("chelsea.png")])[0], levels.transpose(2, 0, 1), atol=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    ["CLIPImageProcessorFast", "CLIPImageProcessorPil", "LlavaImageProcessor", "LlavaImageProcessorPil"],
)
def test_all_forms_of_the_supported_processors_are_read(name):
    assert ImageProcessor.from_config({"image_processor_type": name}) == ImageProcessor()


@pytest.mark.parametrize("config", [{}, {"image_processor_type": "Siglip2ImageProcessor", "size": 384}])
def test_other_processors_are_refused_by_name(config):
    found = config.get("image_processor_type")
    with pytest.raises(CheckpointError, match=rf"is {found!r}; supported are CLIPImageProcessor.*LlavaImageProcessor"):
        ImageProcessor.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"longest_edge": 336}}, "size is .*longest_edge.*expected the shorter side or"),
        ({"size": {"shortest_edge": 336, "longest_edge": 0}}, r"size is UpTo\(shorter=336, longer=0\)"),
        ({"size": {"max_height": 336, "max_width": None}}, r"size is Within\(height=336, width=None\)"),
        ({"size": {"height": 336}}, "size is .*height.*expected the shorter side or"),
        ({"size": {"height": 336, "width": 336, "shortest_edge": 336}}, "size is .*expected the shorter side or"),
        ({"size": 10_001}, "size is 10001; expected .*up to 10000"),
        ({"crop_size": {"max_height": 336, "max_width": 336}}, r"crop_size is .*expected \(height, width\)"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean is .*expected three numbers"),
        ({"image_std": [1, 1e-300, 1]}, "image_std is .*none 0"),
        ({"do_center_crop": False, "size": {"max_height": 336, "max_width": 336}}, "would vary in size"),
        ({"do_center_crop": False, "size": {"shortest_edge": 336, "longest_edge": 336}}, "would vary in size"),
        ({"size": 0}, "size is 0"),
        ({"size": [336, 336, 3]}, "size is .*expected the shorter side or"),
        ({"crop_size": {"shortest_edge": 336}}, r"crop_size is .*expected \(height, width\)"),
        ({"resample": 9}, "resample is 9; expected one of Pillow's filters"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'; expected a number"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*expected three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std is .*none 0"),
        ({"do_resize": 1}, "do_resize is 1; expected true or false"),
        ({"do_center_crop": False}, "the output would vary in size"),
        ({"do_center_crop": False, "do_pad": True}, "the output would vary in size"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        ImageProcessor.from_config(CLIP | config)


@pytest.mark.parametrize("config", ["llava 1.5", "llava fast, padded"])
def test_an_image_that_would_swell_beyond_the_limit_is_refused(config):
    image = Image.new("RGB", (2, 200_000))
    with pytest.raises(ImageError, match=r"2 x 200000 pixels is too long and thin.*crop it first"):
        ImageProcessor.from_config(CONFIGS[config])([image])
