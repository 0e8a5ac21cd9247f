from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import skimage
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image

from hivtp.runtime.inputs.image_processor import ImageProcessor
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

ASTRONAUT = Path(skimage.__file__).parent / "data" / "astronaut.png"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(ASTRONAUT).convert("RGB").resize((90, 61))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def gradient(photo: Image.Image) -> Image.Image:
    return Image.linear_gradient("L").resize(photo.size)


def with_alpha(photo: Image.Image) -> Image.Image:
    image = photo.copy()
    image.putalpha(gradient(photo))
    return image


def sixteen_bits(photo: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)


def declare_png(width: int, height: int) -> bytes:
    """Build a PNG that declares any size and holds almost no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


FILES = {
    "jpeg": lambda photo: encode(photo, "JPEG"),
    "progressive jpeg": lambda photo: encode(photo, "JPEG", progressive=True),
    "png": lambda photo: encode(photo, "PNG"),
    "webp": lambda photo: encode(photo, "WEBP"),
    "bmp": lambda photo: encode(photo, "BMP"),
    "tiff": lambda photo: encode(photo, "TIFF"),
    "ppm": lambda photo: encode(photo, "PPM"),
    "jpeg 2000": lambda photo: encode(photo, "JPEG2000"),
    "cmyk jpeg": lambda photo: encode(photo.convert("CMYK"), "JPEG"),
    "grey jpeg": lambda photo: encode(photo.convert("L"), "JPEG"),
    "grey png": lambda photo: encode(photo.convert("L"), "PNG"),
    "grey and alpha": lambda photo: encode(with_alpha(photo).convert("LA"), "PNG"),
    "alpha png": lambda photo: encode(with_alpha(photo), "PNG"),
    "alpha webp": lambda photo: encode(with_alpha(photo), "WEBP"),
    "1 bit": lambda photo: encode(photo.convert("1"), "PNG"),
    "16 bit png": lambda photo: encode(sixteen_bits(photo), "PNG"),
    "16 bit tiff": lambda photo: encode(sixteen_bits(photo), "TIFF"),
    "palette": lambda photo: encode(photo.convert("P"), "PNG"),
    "palette, one transparent": lambda photo: encode(photo.convert("P"), "PNG", transparency=3),
    "palette, many transparent": lambda photo: encode(photo.quantize(8), "PNG", transparency=bytes(range(8))),
    "transparent colour": lambda photo: encode(photo, "PNG", transparency=photo.getpixel((5, 5))),
    "animated gif": lambda photo: encode(
        photo, "GIF", save_all=True, append_images=[photo.rotate(90), photo.rotate(180)]
    ),
    "animated png": lambda photo: encode(photo, "PNG", save_all=True, append_images=[photo.rotate(90)]),
    "animated webp": lambda photo: encode(photo, "WEBP", save_all=True, append_images=[photo.rotate(90)]),
    "multipage tiff": lambda photo: encode(photo, "TIFF", save_all=True, append_images=[photo.rotate(90)]),
    "two pixels": lambda photo: encode(photo.resize((2, 2)), "PNG"),
} | {
    f"{file_format} of orientation {value}": lambda photo, f=file_format, v=value: encode(photo, f, exif=orientation(v))
    for file_format in ("JPEG", "PNG", "WEBP", "TIFF")
    for value in range(1, 9)
}


# Pillow says so where a palette with many transparent entries loses them; transformers lets it.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_pixels_that_transformers_gives(kind, photo, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(FILES[kind](photo))
    expected = transformers_load_image(str(path))
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        memoryview(path.read_bytes()),
    ):
        image = load_image(source)
        assert image.mode == "RGB"
        assert image.size == expected.size
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(path))), np.asarray(expected))


# EXIF of which nothing, or not all, can be read.
DAMAGED_EXIF = {
    "words": b"these are words",
    "empty": b"Exif\0\0",
    "cut header": b"Exif\0\0MM\0*",
    "no directory": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "cut directory": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
}
# A sixth orientation, and a tag whose value lies outside of the data.
HALF_DAMAGED = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\xff\x7f\0\0\0\0"
)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Possibly corrupt EXIF data", "ignore:Truncated File", "ignore:Tag data larger"
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_damaged_exif_turns_nothing_and_refuses_nothing(file_format, exif, photo):
    data, plain = (encode(photo, file_format, exif=value) for value in (DAMAGED_EXIF[exif], b""))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(load_image(plain)))


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Possibly corrupt EXIF data", "ignore:Truncated File", "ignore:Tag data larger"
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_among_damaged_exif_is_applied(file_format, photo):
    data = encode(photo, file_format, exif=HALF_DAMAGED)
    plain = Image.open(io.BytesIO(encode(photo, file_format)))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(plain.rotate(-90, expand=True)))


def test_exif_is_read_where_warnings_are_errors(photo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encode(photo, "PNG", exif=DAMAGED_EXIF["cut directory"])).size == photo.size
        assert load_image(encode(photo, "JPEG", exif=orientation(6))).size == photo.size[::-1]


@pytest.mark.parametrize(
    "kind", ["alpha png", "grey and alpha", "JPEG of orientation 6", "transparent colour", "16 bit png"]
)
def test_the_same_image_gives_the_same_tensor_however_it_comes(kind, photo, tmp_path):
    """Not the pixels alone: what is transparent is flattened after them."""
    path = tmp_path / "image"
    path.write_bytes(FILES[kind](photo))
    sources = [path, path.read_bytes(), Image.open(path), Image.open(path).copy()]
    if kind == "alpha png":
        sources.append(np.asarray(Image.open(path)))
    tensors = [ImageProcessor(size=32, crop_size=(32, 32))([load_image(source)]) for source in sources]
    for tensor in tensors[1:]:
        np.testing.assert_array_equal(tensor, tensors[0])


ODD_INFO = {
    "exif of no bytes": {"exif": 5},
    "exif of words": {"exif": b"words"},
    "xmp of no text": {"XML:com.adobe.xmp": 7},
    "xmp of bytes": {"XML:com.adobe.xmp": b'tiff:Orientation="6"'},
    "a profile of no hex": {"Raw profile type exif": "\nexif\n\nzz"},
    "transparency of words": {"transparency": "white"},
    "transparency of one level": {"transparency": 3},
    "transparency of many": {"transparency": bytes(300)},
    "transparency out of range": {"transparency": (-1, 0, 2**40)},
    "transparency of floats": {"transparency": (0.5, 0.5, 0.5)},
    "an object": {"transparency": object(), "icc_profile": object(), "dpi": "many", 5: object()},
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "HSV"])
@pytest.mark.parametrize("info", ODD_INFO)
def test_odd_info_of_a_pil_image_is_passed_over_or_refused(mode, info, photo):
    image = photo.convert("L" if mode in ("I;16", "F") else "RGB").convert(mode)
    image.info.update(ODD_INFO[info])
    before = dict(image.info)
    # Pillow uses a transparent colour when it converts these.
    may_fail = mode in ("L", "P", "1", "I;16") and info.startswith(("transparency", "an object"))
    with contextlib.suppress(ImageError) if may_fail else contextlib.nullcontext():
        loaded = load_image(image)
        assert set(loaded.info) <= {"transparency"}
        assert ImageProcessor()([loaded]).shape == (1, 3, 224, 224)
    assert image.info == before


def test_info_that_is_not_a_dictionary_is_refused(photo):
    photo = photo.copy()
    photo.info = None
    with pytest.raises(ImageError, match="the PIL image cannot be decoded"):
        load_image(photo)


def test_a_closed_pil_image_is_refused(photo):
    image = Image.open(io.BytesIO(encode(photo, "PNG")))
    image.close()
    with pytest.raises(ImageError, match="the PIL image cannot be decoded"):
        load_image(image)


def test_bytes_that_cannot_be_read_are_refused(photo):
    data = encode(photo, "PNG")
    released = memoryview(data)
    released.release()
    with pytest.raises(ImageError, match=r"the bytes given cannot be read: .*released memoryview"):
        load_image(released)
    for view in (memoryview(data).cast("B"), memoryview(b"".join(bytes([byte, 0]) for byte in data))[::2]):
        assert load_image(view).size == photo.size


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((), np.uint8),
        np.array(None),
        np.array([[object()]]),
        np.zeros((4, 4), "U3"),
        np.zeros((4, 4), [("red", np.uint8)]),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.int8),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_of_any_other_kind_are_refused(array):
    with pytest.raises(ImageError, match="the array of shape"):
        load_image(array)


def test_the_orientation_is_applied_once(photo):
    image = load_image(encode(photo, "JPEG", exif=orientation(6)))
    assert image.size == (photo.height, photo.width)
    assert load_image(image).size == image.size


def test_a_pil_image_is_left_as_it_was_and_shares_nothing(photo):
    before = np.array(photo)
    image = load_image(photo)
    image.paste((1, 2, 3), (0, 0, 10, 10))
    np.testing.assert_array_equal(np.asarray(photo), before)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_uint8_arrays_are_images(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = array[..., :3] if array.ndim == 3 else array[..., None]
    np.testing.assert_array_equal(np.asarray(load_image(array)), np.broadcast_to(expected, (5, 7, 3)))


def test_an_array_with_strides_is_read_in_order():
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 6), dtype=np.uint8).transpose(1, 2, 0)[::2]
    np.testing.assert_array_equal(np.asarray(load_image(array)), array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32.*convert it to uint8 with values 0\.\.255"),
        (np.zeros((4, 4), bool), r"bool.*convert it to uint8"),
        (np.zeros((4, 4), np.uint16), r"uint16.*convert it to uint8"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"\[3, 4, 4, 3\].*expected \[height, width\]"),
        (np.zeros((3, 40, 40), np.uint8), "channels last"),
        (np.zeros(16, np.uint8), r"expected \[height, width\]"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels are too few"),
        (np.zeros((0, 5), np.uint8), "5 x 0 pixels are too few"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_another_type_is_refused():
    with pytest.raises(ImageError, match="an image cannot be a int"):
        load_image(3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"there is no image file '.*absent\.png'"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "there is no image file ''"),
        ("images.py/a.png", "there is no image file 'images.py/a.png'"),
        ("a\0b", r"the image file 'a\\x00b' cannot be opened: .*embedded null"),
        ("a\ud800b", r"the image file 'a\\ud800b' cannot be opened: .*surrogates not allowed"),
        ("a" * 5_000, "the image file 'a*\\.\\.\\.' cannot be opened: File name too long"),
        ("loop", "the image file 'loop' cannot be opened: Too many levels of symbolic links"),
        ("data:image/png;base64," + "A" * 100_000, "data URLs are not decoded: 'data:image/png;base64,A*\\.\\.\\.'"),
        ("/dev/null", "expected an image file, but '/dev/null' is a pipe or a device"),
        ("/dev/zero", "expected an image file, but '/dev/zero' is a pipe or a device"),
        ("pipe", "expected an image file, but 'pipe' is a pipe or a device; read it and pass the bytes"),
    ],
)
def test_a_path_that_leads_to_no_file_is_refused_with_the_reason(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images.py").write_text("")
    Path("loop").symlink_to("loop")
    # Nobody ever writes to it.
    os.mkfifo("pipe")
    with pytest.raises(ImageError, match=f"^{message}") as caught:
        load_image(path)
    assert len(str(caught.value)) < 350


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """The superuser may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_or_folder_that_may_not_be_read_is_named_with_the_reason(photo):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        for file in (folder / "photo.png", folder / "closed" / "photo.png"):
            photo.save(file)
            file.chmod(0o644)
        assert load_image(folder / "photo.png").size == photo.size
        (folder / "photo.png").chmod(0)
        (folder / "closed").chmod(0)
        try:
            for file in ("photo.png", "closed/photo.png"):
                with (
                    without_privileges(),
                    pytest.raises(ImageError, match=f"{file}' cannot be opened: Permission denied"),
                ):
                    load_image(folder / file)
        finally:
            (folder / "closed").chmod(0o755)


def test_an_object_that_is_not_quite_a_path_is_refused():
    class Odd(os.PathLike):
        def __fspath__(self):
            return 3

    with pytest.raises(ImageError, match=r"an image cannot be this Odd, which is not a path: expected Odd\.__fspath__"):
        load_image(Odd())


def test_a_path_in_bytes_is_encoded_bytes(tmp_path, photo):
    photo.save(tmp_path / "photo.png")
    with pytest.raises(ImageError, match="the bytes given: not an image"):
        load_image(os.fsencode(tmp_path / "photo.png"))


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "https://example.org/a.png", "HTTPS://example.org/a"])
def test_urls_are_not_fetched(url):
    with pytest.raises(ImageError, match="URLs are not fetched"):
        load_image(url)


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_not_an_image_is_refused(data, tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"text\.png.*not an image.*expected one of JPEG, PNG"):
        load_image(path)
    with pytest.raises(ImageError, match="the bytes given: not an image"):
        load_image(data)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "ppm", "jpeg 2000", "animated gif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_truncated_file_is_refused(kind, share, photo):
    data = FILES[kind](photo)
    if kind == "animated gif":
        data = encode(photo, "GIF")
    data = data[: int(len(data) * share)]
    with pytest.raises(ImageError, match="damaged"):
        load_image(data)


def test_a_truncated_pil_image_is_refused(photo):
    data = encode(photo, "PNG")
    with pytest.raises(ImageError, match="the PIL image cannot be decoded"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_an_image_with_a_side_of_one_pixel_is_refused(size, photo):
    small = photo.resize(size)
    for source in (small, encode(small, "PNG")):
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels are too few"):
            load_image(source)


def test_too_many_declared_pixels_are_refused_before_decoding():
    # Decoding this one would end in "truncated": the message shows that it never began.
    with pytest.raises(ImageError, match="10000 x 8000 pixels are more than the 1000000 allowed"):
        load_image(declare_png(10_000, 8_000), max_pixels=1_000_000)
    with pytest.raises(ImageError, match="10000 x 8000 pixels are more than the 1000000 allowed"):
        load_image(Image.open(io.BytesIO(declare_png(10_000, 8_000))), max_pixels=1_000_000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_default_limit_is_100_megapixels(photo):
    with pytest.raises(ImageError, match="10001 x 10000 pixels are more than the 100000000 allowed"):
        load_image(declare_png(10_001, 10_000))
    assert load_image(photo, max_pixels=photo.width * photo.height).size == photo.size


@pytest.mark.parametrize("max_pixels", [100_000_000, 10**12])
def test_pillow_refusing_a_bomb_is_an_image_error(max_pixels):
    with pytest.raises(ImageError, match="refused before decoding"):
        load_image(declare_png(60_000, 60_000), max_pixels=max_pixels)


def test_pillow_warning_of_a_bomb_is_an_image_error_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="refused before decoding"):
            load_image(declare_png(9_500, 9_500))


def test_pillows_settings_and_the_warning_filters_stay_as_they_are_under_threads(photo):
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    good, bad = encode(photo, "JPEG"), declare_png(60_000, 60_000)

    def is_refused(data: bytes) -> bool:
        try:
            load_image(data)
        except ImageError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_refused, [good, bad] * 40)) == [False, True] * 40
    assert limit == Image.MAX_IMAGE_PIXELS
    assert list(warnings.filters) == filters
