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


@dataclass(frozen=True)
class View:
    """How some tiles that lie together show an image.

    Attributes:
        tile_rows: rows of tiles.
        tile_cols: columns of tiles.
        region: (left, top, right, bottom) of what they show, in pixels of the image; padding lies outside of it.
    """

    tile_rows: int
    tile_cols: int
    region: tuple[float, float, float, float]


@dataclass(frozen=True)
class TokenCount:
    """How many tokens of an image the language model will see.

    Attributes:
        num_tokens: this many, or at most this many.
        is_exact: whether the number does not depend on what the image shows.
    """

    num_tokens: int
    is_exact: bool


class ImageEncoder(Protocol):
    """Prepares images and encodes them; each image is encoded as it would be alone."""

    def prepare(self, image: Image.Image, num_images: int = 1) -> PreparedImage:
        """Cut, resize and normalise an image as `load_image` gives it.

        Args:
            image: one of the prompt's.
            num_images: of the prompt: LLaVA-OneVision cuts an image into tiles only where it is alone.

        Raises:
            ImageError: the image is too long and thin, or becomes too many tiles.
        """

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode images, all their tiles in as few runs as fit.

        Raises:
            EngineError: the engine failed.
            ScoreError: the scores of an image hold NaN.
        """

    def frames(self, image: Image.Image, num_images: int = 1) -> list[TileFrame]:
        """The image as the model sees it, for people: its tiles in order, before normalising."""

    def views(self, image_size: tuple[int, int], num_images: int = 1) -> list[View]:
        """Where the tiles of an image of this (height, width) lie on it, in the order of the tiles.

        Raises:
            ImageError: it becomes too many tiles.
        """

    def count_tokens(self, image_size: tuple[int, int], num_images: int = 1) -> TokenCount:
        """How many tokens an image of this (height, width) becomes; see `views` for the errors."""
