"""What a bundle for another target would take, from the sizes of the parts of one that was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.export.decoder.build import DEFAULT_BLOCK_SIZE, HALF_PRECISIONS, NUM_BITS
from hivtp.export.space import BYTES_PER_WEIGHT
from hivtp.export.targets import TARGETS

if TYPE_CHECKING:
    from hivtp.engines.manifest import Manifest
    from hivtp.export.targets import Target, TargetName

# Of a scale, which weights of a block share, and the zero point beside it.
SCALE_BYTES = 4.5


def target_lines(manifest: Manifest, target: TargetName) -> list[str]:
    """What a target picked for a bundle, and about what other targets would take."""
    sizes: dict[str, list[str]] = {}
    for name, other in TARGETS.items():
        if name != target:
            sizes.setdefault(f"{_num_bytes(manifest, other) / 1e6:,.0f} MB", []).append(name)
    others = ", ".join(f"{' and '.join(names)} {size}" for size, names in sizes.items())
    return [f"target {target}: {_picked(manifest)}", f"other targets would take about: {others}"]


def _picked(manifest: Manifest) -> str:
    parts = [f"{manifest.vision.precision} vision"]
    decoder = None if manifest.language is None else manifest.language.decoder
    if decoder is not None:
        blocks = "" if decoder.block_size is None else f" in blocks of {decoder.block_size}"
        parts.append(f"{decoder.precision} decoder{blocks}")
        if decoder.prefill_precision is not None:
            parts.append(f"prompts in {decoder.prefill_precision}")
    return ", ".join(parts)


def _num_bytes(manifest: Manifest, target: Target) -> float:
    """Of a bundle with the parts of this one in the precisions of a target."""
    sizes = {name: record.num_bytes for name, record in manifest.files.items()}
    vision, language = manifest.vision, manifest.language
    of_vision = sum(size for name, size in sizes.items() if name.startswith("vision/"))
    changed = of_vision * BYTES_PER_WEIGHT[target.vision_precision] / BYTES_PER_WEIGHT[vision.precision]
    decoder = None if language is None else language.decoder
    if decoder is None:
        return sum(sizes.values()) - of_vision + changed
    of_embeddings = sizes[decoder.embeddings]
    of_decoder = sum(size for name, size in sizes.items() if name.startswith(decoder.file))
    num_weights = of_decoder / _bytes_per_weight(decoder.precision, decoder.block_size)
    of_all_decoders = sum(size for name, size in sizes.items() if name.startswith("language/")) - of_embeddings
    rest = sum(sizes.values()) - of_vision - of_embeddings - of_all_decoders
    changed += num_weights * _bytes_per_weight(target.language_precision, target.block_size)
    if target.prefill_precision is not None:
        changed += num_weights * BYTES_PER_WEIGHT[target.prefill_precision]
    is_half, was_half = (precision in HALF_PRECISIONS for precision in (target.language_precision, decoder.precision))
    return rest + changed + of_embeddings * 2.0 ** (was_half - is_half)


def _bytes_per_weight(precision: str, block_size: int | None) -> float:
    scales = SCALE_BYTES / (block_size or DEFAULT_BLOCK_SIZE) if precision in NUM_BITS else 0
    return BYTES_PER_WEIGHT[precision] + scales
