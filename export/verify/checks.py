"""The numeric check that ends every export: the written graphs against PyTorch, within a tolerance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import create_engine
from hivtp.engines.base import EngineSettings
from hivtp.engines.onnxruntime import open_session
from hivtp.export.decoder.build import ROUNDED_PRECISIONS
from hivtp.export.graph.clip import VisionShape
from hivtp.export.verify.decoder_weights import DecoderWeights
from hivtp.export.verify.reference import language_reference, vision_reference
from hivtp_ops.errors import VerificationError
from hivtp_ops.selection import select

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp_ops.spec import PruningSpec


@dataclass(frozen=True)
class VisionTolerance:
    """How far a vision graph may be from PyTorch in float32.

    Attributes:
        relative_error: of embeddings or features, ||a - b|| / ||b||.
        importance_error: largest absolute difference of a score.
        min_jaccard: least agreement of the kept sets, |A ∩ B| / |A ∪ B|, over all tiles.
    """

    relative_error: float
    importance_error: float
    min_jaccard: float


# Scores are absolute, and so are largest where few patches share the attention: those of 576 patches
# differed by 1.4e-7, those of 64 by up to 1.2e-3. Kept sets agreed to 0.95 of 24 x 24 patches and to 0.91 of smaller
# grids, and to 0.87 where 7 patches were kept and one of two tiles had another.
# fp8 rounds to 4 bits, in the layers behind the scores alone: those are fp16's. Embeddings of ViT-L with random weights
# were off by 0.024 in its 14 layers behind the paper's, and by 0.032 where nothing is pruned and all 23 are in fp8.
VISION_TOLERANCES: Mapping[str, VisionTolerance] = {
    "fp32": VisionTolerance(1e-4, 1e-6, 0.99),
    "fp16": VisionTolerance(1e-2, 1e-4, 0.95),
    "fp8": VisionTolerance(1e-1, 1e-4, 0.95),
    "int8": VisionTolerance(1e-1, 1e-3, 0.80),
}
# Relative error of the logits against PyTorch with the same, possibly quantised, weights, for one layer. The
# kernels of int8 and int4 weights round activations to 8 bits; the layers' errors are independent, so they add
# up with the square root of the depth: 0.02 in 1 layer of LLaVA-1.5-7B's width, 0.054 in 8, 0.11 in all 32. w8a8
# rounds a position as a whole and not block by block, which is coarser: 0.22 in all 32 (and yet it is nearer to the
# checkpoint's own weights than int4, 0.27 against 0.98, those being random).
# Half precision rounds what passes between operators to 11 bits: 0.0011 in 1 layer of that width, 0.0012 with int4
# weights. A CPU multiplies the matrices of such a graph in float32, so what a GPU's products add is not in it.
LANGUAGE_TOLERANCES: Mapping[str, float] = {
    "fp32": 2e-4,
    "int8": 4e-2,
    "int4": 4e-2,
    "w8a8": 8e-2,
    "fp16": 4e-3,
    "int4-fp16": 4e-3,
}
# What to do about a graph that is beyond its tolerance.
ADVICE = "Choose a higher precision for this checkpoint"
NUM_TILES = 2
NUM_PREFILL_TOKENS = 24
NUM_DECODED_TOKENS = 8


@dataclass(frozen=True)
class VisionReport:
    """What the check of a vision graph found; errors as in VisionTolerance."""

    relative_error: float
    importance_error: float | None
    kept_jaccard: float | None


@dataclass(frozen=True)
class LanguageReport:
    """What the check of a decoder found, over a prefill and decoded steps.

    Attributes:
        relative_error: of the logits, against PyTorch with the weights that the decoder holds.
        quantization_error: of the logits, against PyTorch with the checkpoint's weights; what rounding the
            weights costs is a property of the checkpoint, so it is reported and not bounded.
        argmax_agreement: share of positions with the greedy token of the checkpoint's weights.
    """

    relative_error: float
    quantization_error: float
    argmax_agreement: float


def verify_vision(
    checkpoint: Checkpoint, spec: PruningSpec | None, file: Path, precision: str, kind: str
) -> dict[str, Any]:
    """Compare a vision graph with PyTorch on generated pictures.

    Embeddings are compared on the patches that the graph kept; the kept sets are compared with those that
    the rule selects from PyTorch's scores.

    Returns:
        The report and the tolerance, for the manifest.

    Raises:
        VerificationError: an error is beyond its tolerance.
    """
    shape = VisionShape.of(checkpoint.config)
    pixel_values = sample_pixels(NUM_TILES, shape.image_size)
    reference = vision_reference(checkpoint, spec, pixel_values)
    inputs: dict[str, NDArray[Any]] = {"pixel_values": pixel_values}
    importance = reference.importance
    if checkpoint.family == "llava_next" and spec is not None and kind == "vision":
        inputs["patch_mask"] = patch_mask = sample_patch_mask(NUM_TILES, shape.grid)
        assert importance is not None, "a spec has scoring layers"
        importance = np.where(patch_mask, importance, np.float32(-np.inf))
    outputs = create_engine("onnxruntime", file).run(inputs)
    if kind == "encoder":
        report = VisionReport(
            relative_error(outputs["features"], reference.features),
            largest_difference(outputs["importance"], importance),
            None,
        )
    elif spec is None or importance is None:
        report = VisionReport(relative_error(outputs["image_embeds"], reference.embeds), None, None)
    else:
        expected = select(importance, shape.grid, spec)
        kept = outputs["kept_indices"]
        prefix = shape.num_prefix_tokens
        rows = np.concatenate([np.tile(np.arange(prefix), (NUM_TILES, 1)), np.maximum(kept, 0) + prefix], axis=1)
        embeds = np.take_along_axis(reference.embeds, rows[:, :, None], axis=1)
        is_kept = np.concatenate([np.ones((NUM_TILES, prefix), bool), kept >= 0], axis=1)
        report = VisionReport(
            relative_error(outputs["image_embeds"], embeds * is_kept[:, :, None]),
            largest_difference(outputs["importance"], importance),
            jaccard(kept, expected.indices),
        )
    tolerance = VISION_TOLERANCES[precision]
    refuse(
        f"the {precision} vision graph",
        [
            ("relative error", report.relative_error, "at most", tolerance.relative_error),
            ("importance error", report.importance_error, "at most", tolerance.importance_error),
            ("kept-token agreement", report.kept_jaccard, "at least", tolerance.min_jaccard),
        ],
    )
    return {"tiles": NUM_TILES, **asdict(report), "tolerance": asdict(tolerance)}


def verify_language(
    checkpoint: Checkpoint, file: Path, precision: str, *, is_for_prompts: bool = False
) -> dict[str, Any]:
    """Compare a decoder with PyTorch: a prefill, then teacher-forced steps through the KV cache.

    One for prompts is compared by itself, steps included, and not in turns with the decoder that it goes with.

    Returns:
        The report and the tolerance, for the manifest.

    Raises:
        VerificationError: the logits are beyond the tolerance.
    """
    config = checkpoint.config.text_config
    length = min(NUM_PREFILL_TOKENS + NUM_DECODED_TOKENS, config.max_position_embeddings)
    token_ids = np.random.default_rng(0).integers(config.vocab_size, size=length)
    embeds = checkpoint.language_tensor("model.embed_tokens.weight")[token_ids].float().numpy()
    part, advice = ("decoder for prompts", "Leave --prefill-precision out") if is_for_prompts else ("decoder", ADVICE)
    found = _decode(open_session(file, EngineSettings()), embeds, config.head_dim)

    def expected(read_weight: Callable[[str], torch.Tensor]) -> NDArray[np.float32]:
        return language_reference(config, read_weight, [embeds])[0][NUM_PREFILL_TOKENS - 1 :]

    original = expected(checkpoint.language_tensor)
    same_weights = expected(DecoderWeights(checkpoint, file).tensor) if precision in ROUNDED_PRECISIONS else original
    report = LanguageReport(
        relative_error(found, same_weights),
        relative_error(found, original),
        float((found.argmax(axis=1) == original.argmax(axis=1)).mean()),
    )
    tolerance = LANGUAGE_TOLERANCES[precision] * math.sqrt(config.num_hidden_layers)
    refuse(f"the {precision} {part}", [("relative error", report.relative_error, "at most", tolerance)], advice=advice)
    return {"tokens": length, **asdict(report), "tolerance": {"relative_error": tolerance}}


def _decode(session: Any, embeds: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """Logits [1 + decoded steps, vocab] of the positions from the last prefill token on."""
    names = [output.name for output in session.get_outputs()]
    dtypes = {
        value.name: np.float16 if value.type == "tensor(float16)" else np.float32 for value in session.get_inputs()
    }
    embeds = embeds.astype(dtypes["inputs_embeds"])
    cache = {
        value.name: np.zeros((1, value.shape[1], 0, head_size), dtypes[value.name])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    logits, position = [], 0
    steps = [embeds[:NUM_PREFILL_TOKENS], *embeds[NUM_PREFILL_TOKENS:, None]]
    for step in steps:
        position += len(step)
        mask = np.ones((1, position), np.int64)
        outputs = session.run(None, {"inputs_embeds": step[None], "attention_mask": mask, **cache})
        named = dict(zip(names, outputs, strict=True))
        logits.append(named["logits"][0, -1].astype(np.float32))
        cache = {name: named[name.replace("past_key_values", "present")] for name in cache}
    return np.stack(logits)


def sample_pixels(num_tiles: int, image_size: int) -> NDArray[np.float32]:
    """Generated pictures, normalised: soft colour fields with sharp rectangles and a little noise.

    Returns:
        [tiles, 3, image_size, image_size] float32, the same at every call.
    """
    rng = np.random.default_rng(2509_23663)
    axis = np.linspace(0, 2 * np.pi, image_size, dtype=np.float32)
    rows, columns = axis[:, None], axis[None, :]
    pictures = np.empty((num_tiles, 3, image_size, image_size), np.float32)
    for channel in pictures.reshape(-1, image_size, image_size):
        phase, frequency = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.5, 3, 2)
        channel[:] = np.sin(frequency[0] * rows + phase[0]) + np.cos(frequency[1] * columns + phase[1])
    for picture in pictures:
        for _ in range(6):
            top, left = rng.integers(0, image_size * 3 // 4, 2)
            height, width = rng.integers(image_size // 16, image_size // 3, 2)
            picture[:, top : top + height, left : left + width] = rng.uniform(-1.8, 2.0, (3, 1, 1))
    # Over all, so that no two patches are alike and scores do not tie.
    pictures += rng.normal(0, 0.1, pictures.shape).astype(np.float32)
    return pictures


def sample_patch_mask(num_tiles: int, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask as LLaVA-NeXT has it: the first tile whole, the others with padding above and below.

    Returns:
        [tiles, patches] bool, False for padding.
    """
    rows, cols = grid
    mask = np.ones((num_tiles, rows, cols), dtype=np.bool_)
    mask[1:, : rows // 4] = mask[1:, rows - rows // 4 :] = False
    return mask.reshape(num_tiles, rows * cols)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """||found - expected|| / ||expected||, in float64."""
    difference = np.linalg.norm(found.astype(np.float64).ravel() - expected.astype(np.float64).ravel())
    return float(difference / np.linalg.norm(expected.astype(np.float64).ravel()))


def jaccard(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """|A ∩ B| / |A ∪ B| of two [tiles, capacity] kept sets, padding (-1) left out."""
    pairs = [
        {(tile, index) for tile, row in enumerate(kept.tolist()) for index in row if index >= 0}
        for kept in (first, second)
    ]
    return len(pairs[0] & pairs[1]) / max(1, len(pairs[0] | pairs[1]))


def largest_difference(found: NDArray[Any], expected: NDArray[Any] | None) -> float:
    """Of two arrays of scores, where -inf on both sides is no difference."""
    assert expected is not None, "what is compared was computed"
    # Padding is -inf on both sides, and its difference no number.
    is_padding = np.isneginf(found) & np.isneginf(expected)
    return float(np.abs(np.where(is_padding, 0, found) - np.where(is_padding, 0, expected)).max())


def refuse(
    subject: str,
    checks: list[tuple[str, float | None, str, float]],
    reference: str = "PyTorch",
    advice: str = ADVICE,
) -> None:
    """Refuse a graph that is beyond a tolerance.

    Args:
        subject: the graph.
        checks: name, value found or None, "at most" or "at least", and the limit, of each.
        reference: what it was compared with.
        advice: what to do.

    Raises:
        VerificationError: a value is beyond its limit.
    """
    for name, found, bound, limit in checks:
        if found is None:
            continue
        # Written so that NaN is refused too.
        is_within = found <= limit if bound == "at most" else found >= limit
        if not is_within:
            raise VerificationError(
                f"{subject} differs from {reference}: its {name} is {found:.3g}, allowed is {bound} {limit:.3g}; "
                f"nothing was written. {advice}"
            )
