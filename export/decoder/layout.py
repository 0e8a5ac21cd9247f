"""Where a bundle keeps its decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.engines.manifest import DecoderManifest
from hivtp.export.decoder.build import DECODER_NAME, EMBEDDINGS_NAME, PREFILL_NAME, decoder_dtype

if TYPE_CHECKING:
    from hivtp.export.decoder.build import DecoderKind

LANGUAGE_FOLDER = "language"


def decoder_manifest(kind: DecoderKind) -> DecoderManifest:
    """What a manifest says of a decoder of some kind."""
    has_prefill = kind.prefill_precision is not None
    return DecoderManifest(
        file=f"{LANGUAGE_FOLDER}/{DECODER_NAME}",
        embeddings=f"{LANGUAGE_FOLDER}/{EMBEDDINGS_NAME}",
        precision=kind.precision,
        block_size=kind.block_size,
        prefill_file=f"{LANGUAGE_FOLDER}/{PREFILL_NAME}" if has_prefill else None,
        prefill_precision=kind.prefill_precision,
        dtype=decoder_dtype(kind.precision),
    )
