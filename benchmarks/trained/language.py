"""What rounding does to a trained language model: perplexity, greedy tokens and logits on a text, against float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.pipelines import load_pipeline
from hivtp.export.settings import ExportSettings
from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.timing.workspace import Workspace
    from hivtp.runtime.language.base import LanguageBackend

REFERENCE = "fp32"
DECODERS = {
    REFERENCE: ExportSettings(preset="64"),
    "int8, blocks of 32": ExportSettings(preset="64", language_precision="int8", block_size=32),
    "int8, blocks of 128": ExportSettings(preset="64", language_precision="int8", block_size=128),
    "w8a8, plain": ExportSettings(preset="64", language_precision="w8a8", language_rounding="plain"),
    "w8a8": ExportSettings(preset="64", language_precision="w8a8"),
    "int4, blocks of 32, plain": ExportSettings(
        preset="64", language_precision="int4", block_size=32, language_rounding="plain"
    ),
    "int4, blocks of 32": ExportSettings(preset="64", language_precision="int4", block_size=32),
    "int4, blocks of 128, plain": ExportSettings(
        preset="64", language_precision="int4", block_size=128, language_rounding="plain"
    ),
    "int4, blocks of 128": ExportSettings(preset="64", language_precision="int4", block_size=128),
}
NUM_PREFILL_TOKENS = 16
PIECE_TOKENS = 176


def measure_language(workspace: Workspace, text: str, num_threads: int) -> list[dict[str, Any]]:
    """Compare every decoder with the float32 one, on pieces of a text that are read token by token.

    Returns:
        For each decoder and each piece the mean cost of the next token in nats, the share of positions whose greedy
        token is that of float32, and the relative error of the logits.
    """
    rows, expected = [], None
    for name, folder in workspace.bundles(DECODERS).items():
        print(f"  reading the text with {name}", flush=True)
        with load_pipeline(folder, num_threads) as pipeline:
            pieces = pieces_of(pipeline.model.tokenizer.encode(text))
            language = pipeline.model.language
            assert isinstance(language, OnnxRuntimeLanguage), "the bundles hold decoders"
            found = read(language, pieces)
        expected = found if expected is None else expected
        rows.append({"decoder": name, "pieces": compare(found, expected, pieces[:, NUM_PREFILL_TOKENS:])})
    return rows


def pieces_of(token_ids: Sequence[int]) -> NDArray[np.int64]:
    """Token ids [pieces, PIECE_TOKENS]; what is left at the end is dropped."""
    num_pieces = len(token_ids) // PIECE_TOKENS
    return np.array(token_ids[: num_pieces * PIECE_TOKENS], np.int64).reshape(num_pieces, PIECE_TOKENS)


def read(language: LanguageBackend, pieces: NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits [pieces, positions, vocab] float32 of every token after the prefill, all pieces side by side."""
    slots = language.open_slots(len(pieces), PIECE_TOKENS)
    every = range(len(pieces))
    prefilled = [
        slots.prefill(slot, language.embed(piece[:NUM_PREFILL_TOKENS].tolist()), NUM_PREFILL_TOKENS).copy()
        for slot, piece in enumerate(pieces)
    ]
    logits = [np.stack(prefilled)]
    # The last token has none after it.
    steps = pieces[:, NUM_PREFILL_TOKENS:-1].T
    logits += [slots.step(every, language.embed(tokens.tolist())).copy() for tokens in steps]
    return np.stack(logits, axis=1)


def compare(
    found: NDArray[np.float32], expected: NDArray[np.float32], targets: NDArray[np.int64]
) -> list[dict[str, float]]:
    """How logits [pieces, positions, vocab] predict the targets [pieces, positions], and agree with others.

    Returns:
        For each piece: "nats" per token, "same_token" as a share, "logits_error" relative.
    """
    rows = []
    for mine, its, ids in zip(found, expected, targets, strict=True):
        largest = mine.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(mine - largest).sum(axis=1)) + largest[:, 0]
        rows.append(
            {
                "nats": float((log_total - mine[np.arange(len(ids)), ids]).mean()),
                "same_token": float((mine.argmax(axis=1) == its.argmax(axis=1)).mean()),
                "logits_error": float(np.linalg.norm(mine - its) / np.linalg.norm(its)),
            }
        )
    return rows
