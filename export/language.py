"""The language part of a bundle: a decoder, written or copied from another bundle, or none; and its manifest."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hivtp.engines.manifest import DecoderManifest, LanguageManifest
from hivtp.engines.record import read_record
from hivtp.export.checkpoint.config import head_size
from hivtp.export.decoder.build import (
    PREFILL_NAME,
    DecoderKind,
    DecoderPrecision,
    write_decoder,
    write_embeddings,
)
from hivtp.export.decoder.layout import LANGUAGE_FOLDER, decoder_manifest
from hivtp.export.decoder.reuse import take_decoder
from hivtp.export.verify.language import LanguageReport, verify_language
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.checkpoint.generation import GenerationDefaults
    from hivtp.export.progress import Progress

# "none" leaves the language model to the checkpoint.
LanguagePrecision: TypeAlias = Literal[DecoderPrecision, "none"]


def num_decoder_steps(kind: DecoderKind | None, is_taken_over: bool) -> int:
    """How many steps of progress `export_decoder` takes; none where there is no decoder."""
    if kind is None:
        return 0
    if is_taken_over:
        return 1
    return 3 if kind.prefill_precision is None else 5


def export_decoder(
    checkpoint: Checkpoint, folder: Path, kind: DecoderKind, source: Bundle | None, progress: Progress
) -> tuple[DecoderManifest, dict[str, Any]]:
    """Put a decoder into a bundle: that of another bundle, or a new one, compared with PyTorch.

    Args:
        checkpoint: an open checkpoint.
        folder: the bundle that is being written.
        kind: which decoder.
        source: from `open_source`, to take its decoder over; None writes one.
        progress: takes `num_decoder_steps` steps.

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
        with progress.step(f"Decoder, {kind.precision}"):
            decoder = write_decoder(checkpoint, language, kind.precision, progress.update, block_size=kind.block_size)
        with progress.step("Decoder against PyTorch"):
            verification = {"language": verify_language(checkpoint, decoder, kind.precision)}
        if kind.prefill_precision is not None:
            with progress.step(f"Prefill decoder, {kind.prefill_precision}"):
                prefill = write_decoder(
                    checkpoint, language, kind.prefill_precision, progress.update, name=PREFILL_NAME
                )
            with progress.step("Prefill decoder against PyTorch"):
                verification["prefill"] = verify_language(
                    checkpoint, prefill, kind.prefill_precision, is_for_prompts=True
                )
    return decoder_manifest(kind), verification


def _check_reports(verification: Mapping[str, Any], kind: DecoderKind, source: Bundle) -> None:
    """Refuse what another bundle says of its check, if it is not what a check gives: the summary will show it."""
    for part in ("language",) if kind.prefill_precision is None else ("language", "prefill"):
        try:
            found = verification[part]
            read_record(LanguageReport, {item.name: found[item.name] for item in fields(LanguageReport)})
            _ = f"{found['tolerance']['relative_error']:.0e}"
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
