"""Pictures as the vision graph takes them, before they are encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivtp.runtime.images import image_name, load_image
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.image_encoder import ImageEncoder
    from hivtp.runtime.images import ImageSource
    from hivtp.runtime.tiling import TileLayout


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the vision graph takes it.

    Attributes:
        pixel_values: [tiles, 3, side, side] float32.
        layout: how the tiles lie on the picture; None where the picture is one tile.
    """

    pixel_values: NDArray[np.float32]
    layout: TileLayout | None


def prepare_images(encoder: ImageEncoder, sources: Sequence[ImageSource]) -> list[PreparedImage]:
    """Read and prepare the pictures of one request.

    Raises:
        ImageError: which of them cannot be read or is refused, and why.
    """
    prepared = []
    for number, source in enumerate(sources, start=1):
        place = f"image {number} of {len(sources)}: " if len(sources) > 1 else ""
        try:
            image = load_image(source)
        except ImageError as error:
            raise ImageError(f"{place}{error}") from error
        try:
            prepared.append(encoder.prepare(image))
        except ImageError as error:
            raise ImageError(f"{place}{image_name(source)}: {error}") from error
    return prepared


def check_family(images: Sequence[PreparedImage], family: str, is_tiled: bool, side: int) -> None:
    """Refuse pictures that the pipeline of another model has prepared.

    Args:
        images: of one batch.
        family: what this model is, for people.
        is_tiled: whether a picture becomes several tiles in it.
        side: of its tiles, in pixels.

    Raises:
        ImageError: a picture was prepared for the other family, or for tiles of another size.
    """
    for image in images:
        num_tiles = 1 if image.layout is None else image.layout.num_tiles
        shape = image.pixel_values.shape
        if (image.layout is not None) != is_tiled or shape != (num_tiles, 3, side, side):
            kind = "LLaVA-1.5" if image.layout is None else "LLaVA-NeXT"
            raise ImageError(
                f"a picture of this batch was prepared for {kind}, as pixels of shape {list(shape)}; this bundle is "
                f"{family} with tiles of {side} x {side} pixels: prepare all pictures of a batch with the pipeline "
                "that answers"
            )
