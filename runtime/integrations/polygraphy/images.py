"""Images as the inputs of vision graphs, prepared as a bundle says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hivtp.engines.bundle import MANIFEST_NAME, Bundle
from hivtp.runtime.inputs.images import image_name, load_image
from hivtp.runtime.integrations.polygraphy.base import polygraphy_errors
from hivtp.runtime.vision import VisionOptions, create_image_encoder
from hivtp_ops.errors import BundleError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.engines.base import Arrays
    from hivtp.runtime.inputs.images import ImageSource

# The inputs of one run, by name.
Feed: TypeAlias = "dict[str, NDArray[Any]]"


class _NoEngine:
    """Takes the place of an engine where images are prepared and not encoded."""

    max_tiles: int | None = None
    description = "nothing"

    def __init__(self, bundle: Bundle) -> None:
        self.output_names = () if bundle.manifest.pruning is None else ("kept_indices",)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        raise NotImplementedError


def bundle_images(model: str, images: Sequence[str]) -> list[Feed]:
    """A data loader of Polygraphy.

    Args:
        model: the vision graph of a bundle, one of its plans, or its folder.
        images: image files.

    Returns:
        The inputs of each run: an image, or a part of its tiles where it has more than one run takes.
    """
    with polygraphy_errors():
        return [feed for feeds in image_feeds(find_bundle(model), images) for feed in feeds]


def find_bundle(model: str | Path) -> Bundle:
    """The bundle that a file lies in.

    Raises:
        BundleError: it lies in none, or the bundle is damaged.
    """
    path = Path(model)
    # A plan lies three folders deep.
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / MANIFEST_NAME).is_file():
            return Bundle.open(folder)
    raise BundleError(
        f"{model} does not lie in a bundle; give the vision/model.onnx of a folder that hivtp export wrote"
    )


def image_feeds(bundle: Bundle, images: Sequence[ImageSource], max_tiles: int | None = None) -> list[list[Feed]]:
    """Read images and prepare them.

    Args:
        bundle: says how.
        images: what `load_image` takes.
        max_tiles: most tiles of one run; None takes as many as a pipeline does.

    Returns:
        For each image the inputs of its runs: `pixel_values` [tiles, 3, side, side] float32, and of a LLaVA-NeXT
        bundle `patch_mask` [tiles, patches] bool.

    Raises:
        BundleError: the image preprocessing is damaged or not supported, or absent as in an encoder bundle.
        ImageError: an image cannot be read or is refused.
    """
    if max_tiles is None:
        max_tiles = VisionOptions().max_tiles_per_run
    encoder = create_image_encoder(bundle, _NoEngine(bundle), VisionOptions(cache_bytes=0))
    feeds = []
    for source in images:
        image = load_image(source)
        try:
            prepared = encoder.prepare(image)
        except ImageError as error:
            raise ImageError(f"{image_name(source)}: {error}") from error
        feed: Feed = {"pixel_values": prepared.pixel_values}
        if prepared.layout is not None:
            feed["patch_mask"] = prepared.layout.patch_mask(bundle.manifest.vision.grid)
        starts = range(0, len(prepared.pixel_values), max_tiles)
        feeds.append([{name: array[start : start + max_tiles] for name, array in feed.items()} for start in starts])
    return feeds
