"""What hivtp-export says at its end: what was written, how large it is, how close to PyTorch, and how to run it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hivtp.export.decoder.build import ROUNDED_PRECISIONS
from hivtp_ops.spec import PAPER_LAYERS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.engines.manifest import Manifest, SourceManifest


def summary(bundle: Bundle, checkpoint: str | Path) -> str:
    """What was written from a checkpoint, how large it is, how close to PyTorch, and how to run it."""
    manifest = bundle.manifest
    vision, language = manifest.vision, manifest.language
    lines = [f"wrote {bundle.folder} from {_source(manifest.source)}"]
    found = manifest.verification["vision"]
    checks = [_relative_error(found)]
    if found["importance_error"] is not None:
        checks.append(f"importance error {found['importance_error']:.1e}")
    if found["kept_jaccard"] is not None:
        checks.append(f"kept-token agreement {found['kept_jaccard']:.1%}")
    if "calibration_pictures" in found:
        number = found["calibration_pictures"]
        checks.append(f"scaled to {number} picture{'' if number == 1 else 's'}")
    lines.append(_part(manifest, "vision", vision.precision, ["vision/"], checks))
    decoder = None if language is None else language.decoder
    if decoder is not None:
        checks = _decoder_checks(manifest.verification["language"], decoder.precision)
        lines.append(_part(manifest, "language", decoder.precision, [decoder.file, decoder.embeddings], checks))
        if decoder.prefill_file is not None and decoder.prefill_precision is not None:
            checks = _decoder_checks(manifest.verification["prefill"], decoder.prefill_precision)
            lines.append(_part(manifest, "prompts", decoder.prefill_precision, [decoder.prefill_file], checks))
    elif language is not None:
        lines.append("  language  none      no decoder: transformers answers, from the checkpoint")
    lines.append(f"  tokens    {_tokens(manifest)}")
    if manifest.pruning is not None and _has_scaled_layers(manifest.pruning, vision.num_layers):
        lines.append(
            f"  layers    those are the paper's for a tower of {PAPER_LAYERS} layers, scaled to one of "
            f"{vision.num_layers}; others may see better: rank them with --choose-layers (docs/choosing-layers.md)"
        )
    if language is not None:
        options = f"--language-backend transformers --language-checkpoint {checkpoint} "
        backend = options if decoder is None else ""
        lines.append(f"\nask it: hivtp run {bundle.folder} {backend}--image PHOTO 'What is in the picture?'")
    return "\n".join(lines)


def _source(source: SourceManifest) -> str:
    return source.name if source.revision is None else f"{source.name} of the hub, commit {source.revision[:12]}"


def _part(manifest: Manifest, name: str, precision: str, paths: Sequence[str], checks: Sequence[str]) -> str:
    size = sum(record.num_bytes for path, record in manifest.files.items() if path.startswith(tuple(paths)))
    return f"  {name:<9} {precision:<9} {size / 1e6:9.1f} MB   {', '.join(checks)}"


def _decoder_checks(found: Mapping[str, Any], precision: str) -> list[str]:
    checks = [_relative_error(found)]
    if precision in ROUNDED_PRECISIONS:
        checks.append(f"quantisation error {found['quantization_error']:.1e}")
    return [*checks, f"same greedy token {found['argmax_agreement']:.0%}"]


def _relative_error(found: Mapping[str, Any]) -> str:
    return f"relative error {found['relative_error']:.1e} (allowed {found['tolerance']['relative_error']:.0e})"


def _has_scaled_layers(spec: PruningSpec, num_layers: int) -> bool:
    return num_layers != PAPER_LAYERS and spec == replace(spec, first_layer=None, num_layers=None).resolve(num_layers)


def _tokens(manifest: Manifest) -> str:
    vision, spec, tiling = manifest.vision, manifest.pruning, manifest.tiling
    unit = "image" if tiling is None else "tile"
    if spec is None:
        return f"{vision.num_image_tokens} per {unit}, not pruned"
    layers = f"scored by layers {spec.scoring_layers[0]} to {spec.scoring_layers[-1]}"
    if tiling is not None and tiling.keep_total is not None:
        return f"{tiling.keep_total} per image over all its tiles of {vision.num_image_tokens}, {layers}"
    bound = "" if spec.keep else "up to "
    return f"{bound}{vision.num_prefix_tokens + vision.capacity} of {vision.num_image_tokens} per {unit}, {layers}"
