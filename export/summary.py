"""What an export says in the end: a table of what was written and how close it is to PyTorch, and how to run it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hivtp.engines.manifest import PROCESSOR_FOLDER
from hivtp.export.decoder.build import ROUNDED_PRECISIONS
from hivtp.export.target_sizes import target_lines
from hivtp_ops.spec import PAPER_LAYERS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.engines.manifest import Manifest, SourceManifest
    from hivtp.export.targets import TargetName

HEADER = ("part", "precision", "MB", "error", "allowed", "")
# Those of the columns that hold numbers.
RIGHT = (2, 3, 4)


def summary(bundle: Bundle, checkpoint: str | Path, target: TargetName | None = None) -> str:
    """What was written from a checkpoint: each part with its size and its error, and how to run it.

    Args:
        bundle: what was written.
        checkpoint: as it was named.
        target: what picked the precisions; None where nothing did.
    """
    manifest = bundle.manifest
    lines = [
        f"wrote {bundle.folder} from {_source(manifest.source)}",
        "",
        *_table([HEADER, *_rows(manifest)]),
        "",
        f"tokens: {_tokens(manifest)}",
        *([] if target is None else target_lines(manifest, target)),
    ]
    if manifest.pruning is not None and _has_scaled_layers(manifest.pruning, manifest.vision.num_layers):
        lines.append(
            f"layers: the paper's for a tower of {PAPER_LAYERS} layers, scaled to one of {manifest.vision.num_layers}; "
            f"others may do better: rank them on your own images with hivtp layers {shlex.quote(str(checkpoint))} *.jpg"
        )
    if manifest.language is not None:
        options = ["--image", "PHOTO"]
        if manifest.language.decoder is None:
            options += ["--language-backend", "transformers", "--language-checkpoint", str(checkpoint)]
        command = shlex.join(["hivtp", "run", str(bundle.folder), *options, "What is in the image?"])
        lines += ["", f"next: {command}"]
    return "\n".join(lines)


def _source(source: SourceManifest) -> str:
    return source.name if source.revision is None else f"{source.name} of the hub, commit {source.revision[:12]}"


def _rows(manifest: Manifest) -> list[Sequence[str]]:
    vision, language, checked = manifest.vision, manifest.language, manifest.verification
    rows: list[Sequence[str]] = [
        _row(manifest, "vision", vision.precision, ["vision/"], checked["vision"], _vision_notes(checked["vision"]))
    ]
    decoder = None if language is None else language.decoder
    if decoder is not None:
        files, found = [decoder.file, decoder.embeddings], checked["language"]
        notes = _decoder_notes(found, decoder.precision)
        rows.append(_row(manifest, "language", decoder.precision, files, found, notes))
        if decoder.prefill_file is not None and decoder.prefill_precision is not None:
            found = checked["prefill"]
            notes = _decoder_notes(found, decoder.prefill_precision)
            rows.append(_row(manifest, "prefill", decoder.prefill_precision, [decoder.prefill_file], found, notes))
    elif language is not None:
        rows.append(("language", "none", "", "", "", "transformers answers, from the checkpoint"))
    if language is not None:
        rows.append(("processor", "", _megabytes(manifest, [f"{PROCESSOR_FOLDER}/"]), "", "", ""))
    rows.append(("all", "", _megabytes(manifest, [""]), "", "", ""))
    return rows


def _row(
    manifest: Manifest, name: str, precision: str, files: Sequence[str], found: Mapping[str, Any], notes: Iterable[str]
) -> Sequence[str]:
    error, allowed = found["relative_error"], found["tolerance"]["relative_error"]
    return name, precision, _megabytes(manifest, files), f"{error:.1e}", f"{allowed:.0e}", ", ".join(notes)


def _vision_notes(found: Mapping[str, Any]) -> list[str]:
    notes = [f"median token {found['median_row_error']:.1e}"]
    if found["importance_error"] is not None:
        notes.append(f"scores {found['importance_error']:.1e}")
    if found["kept_jaccard"] is not None:
        notes.append(f"kept tokens agree to {found['kept_jaccard']:.1%}")
    if "refused" in found:
        notes.append(f"instead of {found['refused'].partition(':')[0]}, which its check refused")
    if "calibration_images" in found:
        notes.append(f"calibrated on {_count(found['calibration_images'], 'image')}")
    return notes


def _decoder_notes(found: Mapping[str, Any], precision: str) -> list[str]:
    median, same = f"median token {found['median_row_error']:.1e}", f"same best token {found['argmax_agreement']:.0%}"
    if precision not in ROUNDED_PRECISIONS:
        return [median, same]
    where = "on a text" if found["is_text"] else "on random tokens"
    cost = f"rounding costs {found['quantization_error']:.1e} {where}"
    return [median, f"{cost} (median token {found['median_quantization_error']:.1e})", same, *_rounding_notes(found)]


def _rounding_notes(found: Mapping[str, Any]) -> list[str]:
    rounding = found["rounding"]
    if rounding["asked"] != "calibrated" or rounding["method"] is None:
        return []
    names = {"gptq": "rounded by GPTQ", "smoothing": "smoothed"}
    if rounding["method"] not in names:
        return [f"rounded to the nearest, with {rounding['text']}"]
    return [f"{names[rounding['method']]} on {rounding['text']}"]


def _megabytes(manifest: Manifest, paths: Sequence[str]) -> str:
    size = sum(record.num_bytes for path, record in manifest.files.items() if path.startswith(tuple(paths)))
    return f"{size / 1e6:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _has_scaled_layers(spec: PruningSpec, num_layers: int) -> bool:
    return num_layers != PAPER_LAYERS and spec == replace(spec, first_layer=None, num_layers=None).resolve(num_layers)


def _tokens(manifest: Manifest) -> str:
    vision, spec, tiling = manifest.vision, manifest.pruning, manifest.tiling
    unit = "image" if tiling is None else "tile"
    if spec is None:
        return f"{vision.num_image_tokens} per {unit}, not pruned"
    first, last = spec.scoring_layers[0], spec.scoring_layers[-1]
    layers = f"scored by layer {first}" if first == last else f"scored by layers {first} to {last}"
    if tiling is not None and tiling.keep_total is not None:
        return f"{tiling.keep_total} per image over all its tiles of {vision.num_image_tokens}, {layers}"
    bound = "" if spec.keep else "up to "
    return f"{bound}{vision.num_prefix_tokens + vision.capacity} of {vision.num_image_tokens} per {unit}, {layers}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
