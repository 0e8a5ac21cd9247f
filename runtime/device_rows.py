"""Embeddings that stay where they were computed: which rows of which memory make up a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Of a sequence, [length, hidden]: a float32 array, or DeviceRows.
Embeddings: TypeAlias = Any
TOKENS = -1


class DeviceRows:
    """A sequence of embeddings [length, hidden] whose values are gathered on the device, when the decoder runs.

    Cutting, joining and picking rows change indices on the host, and touch no memory of the device.

    Args:
        sources: memory [..., hidden] that rows come from: `engines.view.View`, an `OrtValue`, anything with
            `__dlpack__`, or a float32 array of the host. What computes it must be over.
        source_of: [length] int64, where each row comes from: an index into `sources`, or TOKENS.
        row_of: [length] int64, which row of its source, all but the last dimension taken as one; of TOKENS the id.
    """

    def __init__(self, sources: Sequence[Any], source_of: NDArray[np.int64], row_of: NDArray[np.int64]) -> None:
        self.sources = tuple(sources)
        self.source_of = source_of
        self.row_of = row_of

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int]) -> DeviceRows:
        """The embeddings of token ids."""
        ids = np.asarray(token_ids, dtype=np.int64)
        return cls((), np.full(len(ids), TOKENS), ids)

    @classmethod
    def of_source(cls, source: Any, num_rows: int, start: int = 0) -> DeviceRows:
        """Successive rows of one source."""
        return cls((source,), np.zeros(num_rows, dtype=np.int64), np.arange(start, start + num_rows))

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, rows: slice | NDArray[Any]) -> DeviceRows:
        """Some of the rows: a slice, indices, or a mask."""
        return DeviceRows(self.sources, self.source_of[rows], self.row_of[rows])

    @property
    def nbytes(self) -> int:
        """Memory of the sources, which are held whole."""
        return sum(int(_num_bytes(source)) for source in self.sources)


def concatenate(pieces: Sequence[Embeddings]) -> Embeddings:
    """Join sequences: arrays to an array, and what holds DeviceRows to DeviceRows."""
    if not any(isinstance(piece, DeviceRows) for piece in pieces):
        return np.concatenate(pieces)
    sources: list[Any] = []
    source_of, row_of = [], []
    for piece in pieces:
        rows = piece if isinstance(piece, DeviceRows) else DeviceRows.of_source(piece, len(piece))
        # The last is TOKENS, which an index of -1 finds.
        places = np.array([_find_or_add(sources, source) for source in rows.sources] + [TOKENS])
        source_of.append(places[rows.source_of])
        row_of.append(rows.row_of)
    return DeviceRows(sources, np.concatenate(source_of), np.concatenate(row_of))


def _find_or_add(sources: list[Any], source: Any) -> int:
    for place, known in enumerate(sources):
        if known is source:
            return place
    sources.append(source)
    return len(sources) - 1


def _num_bytes(source: Any) -> int:
    return int(source.nbytes if hasattr(source, "nbytes") else source.tensor_size_in_bytes())
