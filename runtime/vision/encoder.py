"""From images to the tokens that the language model sees of them: what every family offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.runtime.inputs.prepared_image import PreparedImage
    from hivtp.runtime.vision.stage import KeptPatches


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What the language model sees of an image.

    Attributes:
        embeds: [num_tokens, hidden] float32, newline tokens included.
        tiles: which patches each tile kept.
        num_unpruned_tokens: tokens that the unpruned model would see.
        digest: of the image; equal digests mean equal embeddings.
    """

    embeds: NDArray[np.float32]
    tiles: tuple[KeptPatches, ...]
    num_unpruned_tokens: int
    digest: bytes

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All arrays that it holds."""
        scores = [tile.importance for tile in self.tiles if tile.importance is not None]
        return [self.embeds, *scores, *(tile.kept_indices for tile in self.tiles)]


@dataclass(frozen=True)
class TileFrame:
    """An image as some of its tiles show it together.

    Attributes:
        image: RGB, before normalising.
        tile_rows: rows of tiles.
        tile_cols: columns of tiles.
    """

    image: Image.Image
    tile_rows: int = 1
    tile_cols: int = 1


class ImageEncoder(Protocol):
    """Prepares images and encodes them; each image is encoded as it would be alone."""

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Cut, resize and normalise an image as `load_image` gives it.

        Raises:
            ImageError: the image is too long and thin, or becomes too many tiles.
        """

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode images, all their tiles in as few runs as fit.

        Raises:
            EngineError: the engine failed.
            ScoreError: the scores of an image hold NaN.
        """

    def frames(self, image: Image.Image) -> list[TileFrame]:
        """The image as the model sees it, for people: its tiles in order, before normalising."""
