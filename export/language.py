"""The language part of a bundle: a decoder, written or copied from another bundle, or none; and its manifest."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hivtp.engines.manifest import DecoderManifest, LanguageManifest
from hivtp.engines.record import read_record
from hivtp.export.checkpoint.config import head_size
from hivtp.export.decoder.build import (
    CALIBRATED_PRECISIONS,
    GPTQ_PRECISIONS,
    PREFILL_NAME,
    SMOOTHED_PRECISIONS,
    DecoderKind,
    DecoderPrecision,
    Rounding,
    write_decoder,
    write_embeddings,
)
from hivtp.export.decoder.layout import LANGUAGE_FOLDER, decoder_manifest
from hivtp.export.decoder.reuse import take_decoder
from hivtp.export.decoder.rounding.calibrate import Calibration, calibrate
from hivtp.export.verify.language import LanguageReport, verify_language
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.checkpoint.generation import GenerationDefaults
    from hivtp.export.decoder.rounding.smoothing import Smoothing
    from hivtp.export.decoder.rounding.text import CalibrationText
    from hivtp.export.progress import Progress

# What a manifest says of rounding where there was no text to calibrate with.
NO_TEXT = "no text: the tokenizer cannot read the default one"
# "none" leaves the language model to the checkpoint.
LanguagePrecision: TypeAlias = Literal[DecoderPrecision, "none"]


def num_decoder_steps(kind: DecoderKind | None, is_taken_over: bool) -> int:
    """How many steps of progress `export_decoder` takes; none where there is no decoder."""
    if kind is None:
        return 0
    if is_taken_over:
        return 1
    return (3 if kind.prefill_precision is None else 5) + (kind.rounding == "calibrated")


def export_decoder(
    checkpoint: Checkpoint,
    folder: Path,
    kind: DecoderKind,
    source: Bundle | None,
    progress: Progress,
    text: CalibrationText | None = None,
    token_ids: Sequence[int] | None = None,
) -> tuple[DecoderManifest, dict[str, Any]]:
    """Put a decoder into a bundle: that of another bundle, or a new one, compared with PyTorch.

    Args:
        checkpoint: an open checkpoint.
        folder: the bundle that is being written.
        kind: which decoder.
        source: from `open_source`, to take its decoder over; None writes one.
        progress: takes `num_decoder_steps` steps.
        text: to calibrate with; without one, everything is rounded to the nearest.
        token_ids: what decoders are compared on, see `check_token_ids`.

    Returns:
        What was written, and what was found when it was compared: "language", and "prefill" where there is a second
        decoder.

    Raises:
        BundleError: the other bundle does not say how its decoder was checked.
        CheckpointError: the language model cannot be built, or not in that precision.
        MissingExtraError: onnxruntime-genai is not installed.
        VerificationError: the decoder differs from PyTorch by more than its tolerance.
    """
    language = folder / LANGUAGE_FOLDER
    if source is not None:
        with progress.step(f"Decoder of {source.folder}"):
            verification = take_decoder(source, folder)
            _check_reports(verification, kind, source)
    else:
        with progress.step("Token embeddings"):
            write_embeddings(checkpoint, language, kind.precision)
        calibration = None
        if kind.rounding == "calibrated":
            with progress.step("No text to round by" if text is None else f"Rounding by {text.source}"):
                calibration = _calibration(checkpoint, kind, text, progress)
        write = partial(write_decoder, checkpoint, language, on_weight=progress.update)
        smoothing = None if calibration is None else calibration.smoothing
        compare = partial(verify_language, checkpoint, token_ids=token_ids)
        with progress.step(f"Decoder, {kind.precision}"):
            decoder = write(kind.precision, block_size=kind.block_size, calibration=calibration)
            # Its weights are written, and would take gigabytes of memory from here on.
            calibration = Calibration(smoothing=smoothing)
        with progress.step("Decoder against PyTorch"):
            found = compare(decoder, kind.precision, smoothing=_of(kind.precision, smoothing))
            verification = {"language": {**found, "rounding": _rounding(kind.precision, kind.rounding, text)}}
        if kind.prefill_precision is not None:
            precision = kind.prefill_precision
            with progress.step(f"Prefill decoder, {precision}"):
                prefill = write(precision, name=PREFILL_NAME, calibration=calibration)
            with progress.step("Prefill decoder against PyTorch"):
                found = compare(prefill, precision, smoothing=_of(precision, smoothing), is_for_prompts=True)
                verification["prefill"] = {**found, "rounding": _rounding(precision, kind.rounding, text)}
    return decoder_manifest(kind), verification


def _calibration(
    checkpoint: Checkpoint, kind: DecoderKind, text: CalibrationText | None, progress: Progress
) -> Calibration | None:
    if text is None:
        return None
    return calibrate(
        checkpoint,
        text.token_ids,
        block_size=kind.gptq_block_size,
        is_smoothed=kind.is_smoothed,
        on_layer=progress.update,
    )


def _of(precision: str, smoothing: Smoothing | None) -> Smoothing | None:
    """The smoothing by which a decoder of some precision is written."""
    return smoothing if precision in SMOOTHED_PRECISIONS else None


def _rounding(precision: str, rounding: Rounding | None, text: CalibrationText | None) -> dict[str, Any]:
    """What a manifest says of how a decoder was rounded: what was asked for, by which method, and on which text."""
    said: dict[str, Any] = {"asked": rounding, "method": None, "text": None, "tokens": 0}
    if precision not in CALIBRATED_PRECISIONS or rounding is None:
        return said
    if rounding == "plain" or text is None:
        return {**said, "method": "nearest", "text": NO_TEXT if rounding == "calibrated" else None}
    method = "gptq" if precision in GPTQ_PRECISIONS else "smoothing"
    return {**said, "method": method, "text": text.source, "tokens": int(text.token_ids.size)}


def _check_reports(verification: Mapping[str, Any], kind: DecoderKind, source: Bundle) -> None:
    """Refuse what another bundle says of its check, if it is not what a check gives: the summary will show it."""
    for part in ("language",) if kind.prefill_precision is None else ("language", "prefill"):
        try:
            found = verification[part]
            read_record(LanguageReport, {item.name: found[item.name] for item in fields(LanguageReport)})
            _ = f"{found['tolerance']['relative_error']:.0e}"
            _ = [found["is_text"], *(found["rounding"][name] for name in ("asked", "method", "text"))]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"the manifest of {source.folder} does not say how its decoder was checked ({error}); export the "
                "decoder again"
            ) from error


def language_manifest(
    checkpoint: Checkpoint, generation: GenerationDefaults, decoder: DecoderManifest | None
) -> LanguageManifest:
    """What a bundle says of a checkpoint's language model."""
    config = checkpoint.config.text_config
    return LanguageManifest(
        decoder=decoder,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        image_token_id=checkpoint.config.image_token_id,
        eos_token_ids=generation.eos_token_ids,
        sampling=generation.sampling,
    )
