"""The numeric check that ends the export of a decoder: the written file against PyTorch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.manifest import DecoderManifest, LanguageManifest, SamplingDefaults
from hivtp.engines.onnxruntime import open_session
from hivtp.export.checkpoint.config import head_size
from hivtp.export.decoder.build import EMBEDDINGS_NAME, ROUNDED_PRECISIONS, decoder_dtype
from hivtp.export.verify.checks import ADVICE, refuse, relative_error, row_errors
from hivtp.export.verify.operations.decoder_layers import DecoderLayers
from hivtp.export.verify.operations.decoder_weights import DecoderWeights
from hivtp.export.verify.operations.layers import LayerTolerance, check_layers
from hivtp.export.verify.reference import language_reference
from hivtp.runtime.language.kv_cache import KvCache
from hivtp.runtime.language.onnxruntime import OnnxRuntimeSlots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.decoder.rounding.smoothing import Smoothing

# Relative error of the logits against PyTorch with the same, possibly rounded, weights, for one layer. The kernels of
# int8 and int4 weights round activations to 8 bits; the layers' errors are independent, so they add up with the square
# root of the depth: 0.02 in 1 layer of LLaVA-1.5-7B's width, 0.054 in 8, 0.11 in all 32. w8a8 rounds a position as a
# whole and not block by block, which is coarser: 0.22 in all 32 (and yet it is nearer to the checkpoint's own weights
# than int4, 0.27 against 0.98, those being random). It does not tell whether a layer is right: LAYER_TOLERANCES do.
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
# Measured on random weights of several sizes and depths, and on SmolLM2-135M, whose activations have outliers beyond
# those of larger models: operations 2e-6, in half precision 2e-3. The products of int8 and int4 round what they
# multiply within the kernel: 0.02 with random weights, and in the worst row of trained ones 0.08 in blocks of 32, 0.21
# in blocks of 256. Those of w8a8 are exact on what they multiply, which rounding moved by up to 0.08. Weights of one
# output moved by up to 0.03 in 8 bits, 0.06 where an output has one scale, 0.4 in 4 bits in blocks of 256, and further
# where GPTQ moves them on purpose: 0.41 in blocks of 32, 0.50 in blocks of 128. Wrong ones are 1 and more apart.
LAYER_TOLERANCES: Mapping[str, LayerTolerance] = {
    "fp32": LayerTolerance(operation=1e-4, product=1e-4),
    "int8": LayerTolerance(operation=1e-4, product=0.4, weights=0.3),
    "int4": LayerTolerance(operation=1e-4, product=0.4, weights=0.9),
    "w8a8": LayerTolerance(operation=1e-4, product=1e-4, rounding=0.4, weights=0.3),
    "fp16": LayerTolerance(operation=8e-3, product=4e-3),
    "int4-fp16": LayerTolerance(operation=8e-3, product=4e-3, weights=0.9),
}
NUM_PREFILL_TOKENS = 40
NUM_DECODED_TOKENS = 24
# How many times the error of one logit the two best are apart where they must be in the same order.
DECISIVE_MARGIN = 8.0


@dataclass(frozen=True)
class LanguageReport:
    """What the check of a decoder found, over a prefill and decoded steps.

    Attributes:
        relative_error: of the logits, against PyTorch with the weights that the decoder holds.
        median_row_error: the same, of the median position; a few positions with large logits can make the norm.
        quantization_error: of the logits, against PyTorch with the checkpoint's weights; what rounding the
            weights costs is a property of the checkpoint, so it is reported and not bounded.
        median_quantization_error: the same, of the median position.
        argmax_agreement: share of positions with the greedy token of the checkpoint's weights; not bounded.
        decisive_agreement: share of positions with the greedy token of the decoder's weights in PyTorch, of those where
            the two best logits are further apart than the error; None where there are none.
    """

    relative_error: float
    median_row_error: float
    quantization_error: float
    median_quantization_error: float
    argmax_agreement: float
    decisive_agreement: float | None


def verify_language(
    checkpoint: Checkpoint,
    file: Path,
    precision: str,
    *,
    token_ids: Sequence[int] | None = None,
    smoothing: Smoothing | None = None,
    is_for_prompts: bool = False,
) -> dict[str, Any]:
    """Compare a decoder with PyTorch: a prefill and teacher-forced steps, and every operation of a prompt.

    A decoder for prompts is compared by itself, steps included, and not in turns with the decoder that it goes with.

    Args:
        checkpoint: an open checkpoint.
        file: the decoder.
        precision: of the decoder.
        token_ids: of a text, see `check_token_ids`; None takes random ones, on which rounding costs less than on text.
        smoothing: by which the decoder was written; None where it was written without.
        is_for_prompts: whether it is the second decoder, which can be left out.

    Returns:
        The report and the tolerances, for the manifest.

    Raises:
        VerificationError: an error is beyond its tolerance.
    """
    config = checkpoint.config.text_config
    length = min(NUM_PREFILL_TOKENS + NUM_DECODED_TOKENS, config.max_position_embeddings)
    is_text = token_ids is not None
    ids = np.array(token_ids) if is_text else np.random.default_rng(0).integers(config.vocab_size, size=length)
    embeds = checkpoint.language_tensor("model.embed_tokens.weight")[ids[:length]].float().numpy()
    part, advice = ("prefill decoder", "Leave --prefill-precision out") if is_for_prompts else ("decoder", ADVICE)
    subject = f"the {precision} {part}"

    found = _decode(checkpoint, file, precision, embeds)
    weights = DecoderWeights(checkpoint, file) if precision in ROUNDED_PRECISIONS else None
    layers = DecoderLayers(file, config, embeds, weights, smoothing)
    [original] = language_reference(config, checkpoint.language_tensor, [embeds], [len(found)], layers)
    by_layer = check_layers(subject, layers.found, LAYER_TOLERANCES[precision], advice)

    same_weights = layers.logits[-len(found) :]
    report = LanguageReport(
        relative_error(found, same_weights),
        float(np.median(row_errors(found, same_weights))),
        relative_error(found, original),
        float(np.median(row_errors(found, original))),
        float((found.argmax(axis=1) == original.argmax(axis=1)).mean()),
        decisive_agreement(found, same_weights),
    )
    tolerance = LANGUAGE_TOLERANCES[precision] * math.sqrt(config.num_hidden_layers)
    refuse(
        subject,
        [
            ("relative error", report.relative_error, "at most", tolerance),
            ("agreement where the best token is clear", report.decisive_agreement, "at least", 1.0),
        ],
        advice=advice,
    )
    return {
        "tokens": len(embeds),
        "is_text": is_text,
        **asdict(report),
        "tolerance": {"relative_error": tolerance},
        "layers": by_layer,
    }


def decisive_agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float | None:
    """How often two [positions, vocab] have the same largest logit, where their difference does not decide it.

    Returns:
        Of the positions where the two best expected logits are further apart than DECISIVE_MARGIN times the difference
        of a logit at the median position; None where there is none.
    """
    second, first = np.partition(expected, -2, axis=1)[:, -2:].T
    error = np.median(np.sqrt(((found - expected) ** 2).mean(axis=1)))
    is_decisive = first - second > DECISIVE_MARGIN * error
    agrees = found.argmax(axis=1) == expected.argmax(axis=1)
    return float(agrees[is_decisive].mean()) if is_decisive.any() else None


def _decode(checkpoint: Checkpoint, file: Path, precision: str, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    """The runtime's logits [1 + decoded steps, vocab] of the positions from the last prefill token on."""
    manifest = _manifest(checkpoint, file, precision)
    session = open_session(file)
    cache = KvCache(manifest, 1, len(embeds), np.dtype(decoder_dtype(precision)), "cpu")
    slots = OnnxRuntimeSlots(cache, session, session)
    logits = [slots.prefill(0, embeds[:NUM_PREFILL_TOKENS], NUM_PREFILL_TOKENS).copy()]
    logits += [np.array(slots.step([0], embed[None])[0], np.float32) for embed in embeds[NUM_PREFILL_TOKENS:]]
    return np.stack(logits)


def _manifest(checkpoint: Checkpoint, file: Path, precision: str) -> LanguageManifest:
    """What the runtime needs to know of a decoder."""
    config = checkpoint.config.text_config
    return LanguageManifest(
        decoder=DecoderManifest(file.name, EMBEDDINGS_NAME, precision, None, None, None, decoder_dtype(precision)),
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        image_token_id=checkpoint.config.image_token_id,
        eos_token_ids=(),
        sampling=SamplingDefaults(),
    )
