"""The numeric check that ends the export of a vision graph: the written file against PyTorch."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import create_engine
from hivtp.export.graph.shape import VisionShape
from hivtp.export.verify.checks import jaccard, refuse, relative_error, row_errors
from hivtp.export.verify.operations.layers import LayerTolerance, check_layers
from hivtp.export.verify.operations.vision_layers import VisionLayers
from hivtp.export.verify.reference import vision_reference
from hivtp.export.verify.samples import sample_patch_mask, sample_pixels
from hivtp.runtime.vision.agreement import VisionTolerance, score_error
from hivtp_ops.errors import VerificationError
from hivtp_ops.selection import select

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.verify.reference import VisionReference
    from hivtp_ops.spec import PruningSpec


# What rounding may cost against PyTorch in float32, all layers together.
# Measured on towers of random weights of several sizes, and on a trained ViT-S/14, with 24 x 24 patches or fewer.
# Scores: fp32 up to 4e-6 (4e-5 where attention is all but flat), fp16 up to 2e-3, int8 0.01 to 0.03 with random
# weights and 0.15 with trained ones. Kept sets agreed to 0.95 of 24 x 24 patches and to 0.91 of smaller grids, and to
# 0.87 where 7 patches were kept and one of two tiles had another. Embeddings: int8 0.02 and 0.06; fp8, which rounds to
# 4 bits in the layers after the scores alone, 0.03 and 0.07.
VISION_TOLERANCES: Mapping[str, VisionTolerance] = {
    "fp32": VisionTolerance(relative_error=1e-4, min_jaccard=0.99, importance_error=1e-3),
    "fp16": VisionTolerance(relative_error=1e-2, min_jaccard=0.95, importance_error=2e-2),
    "fp8": VisionTolerance(relative_error=1e-1, min_jaccard=0.95, importance_error=2e-2),
    "int8": VisionTolerance(relative_error=1e-1, min_jaccard=0.80, importance_error=2e-1),
}
# Measured in the same way. Products of int8 are exact, and what rounding their inputs costs is bounded apart, but in
# blocks they round what they multiply within the kernel: up to 0.02.
LAYER_TOLERANCES: Mapping[str, LayerTolerance] = {
    "fp32": LayerTolerance(operation=1e-4, product=1e-4),
    "fp16": LayerTolerance(operation=8e-3, product=4e-3),
    "fp8": LayerTolerance(operation=8e-3, product=4e-3, rounding=0.5, weights=0.3),
    "int8": LayerTolerance(operation=1e-4, product=1e-4, blocks=0.2, rounding=0.5, weights=0.3),
}
NUM_TILES = 2


@dataclass(frozen=True)
class VisionReport:
    """What the check of a vision graph found; errors as in Agreement, and kept sets over all tiles."""

    relative_error: float
    median_row_error: float
    importance_error: float | None
    kept_jaccard: float | None


def verify_vision(
    checkpoint: Checkpoint, spec: PruningSpec | None, file: Path, precision: str, kind: str
) -> dict[str, Any]:
    """Compare a vision graph with PyTorch on generated images: as a whole, and operation by operation.

    Embeddings are compared on the patches that the graph kept; the kept sets are compared with those that
    the rule selects from PyTorch's scores, and must be those that it selects from the graph's own.

    Args:
        checkpoint: an open checkpoint.
        spec: with its layers resolved; None for no pruning.
        file: the graph.
        precision: of the graph.
        kind: which graph, "vision" or "encoder".

    Returns:
        The report and the tolerances, for the manifest.

    Raises:
        VerificationError: an error is beyond its tolerance.
    """
    shape = VisionShape.of(checkpoint.config)
    inputs: dict[str, NDArray[Any]] = {"pixel_values": sample_pixels(NUM_TILES, shape.image_size)}
    if checkpoint.is_tiled and spec is not None and kind == "vision":
        inputs["patch_mask"] = sample_patch_mask(NUM_TILES, shape.grid)
    *others, last = ({name: values[tile : tile + 1] for name, values in inputs.items()} for tile in range(NUM_TILES))
    layers = VisionLayers(file, last, shape.num_layers, shape.num_feature_layers)
    reference = vision_reference(checkpoint, spec, inputs["pixel_values"], layers)
    subject = f"the {precision} vision graph"
    by_layer = check_layers(subject, layers.found, LAYER_TOLERANCES[precision])
    # One by one, so that memory holds the values of one tile.
    engine = create_engine("onnxruntime", file)
    tiles = [*(engine.run(tile) for tile in others), layers.outputs]
    outputs = {name: np.concatenate([tile[name] for tile in tiles]) for name in engine.output_names}
    # The graph's values and PyTorch's modules take gigabytes, some of them in cycles, and a decoder may come next.
    del layers, engine, tiles
    gc.collect()
    report = _compare(outputs, reference, inputs.get("patch_mask"), shape, spec)
    tolerance = VISION_TOLERANCES[precision]
    refuse(
        subject,
        [
            ("relative error", report.relative_error, "at most", tolerance.relative_error),
            ("median token error", report.median_row_error, "at most", tolerance.relative_error),
            ("importance error", report.importance_error, "at most", tolerance.importance_error),
            ("kept-token agreement", report.kept_jaccard, "at least", tolerance.min_jaccard),
        ],
    )
    return {"tiles": NUM_TILES, **asdict(report), "tolerance": asdict(tolerance), "layers": by_layer}


def _compare(
    outputs: Mapping[str, NDArray[Any]],
    reference: VisionReference,
    patch_mask: NDArray[np.bool_] | None,
    shape: VisionShape,
    spec: PruningSpec | None,
) -> VisionReport:
    importance = reference.importance
    if importance is not None and patch_mask is not None:
        importance = np.where(patch_mask, importance, np.float32(-np.inf))
    if "features" in outputs:
        assert importance is not None, "an encoder graph has scoring layers"
        scores = score_error(outputs["importance"], importance)
        return VisionReport(*_errors(outputs["features"], reference.features), scores, None)
    embeds = outputs["image_embeds"]
    if spec is None or importance is None:
        return VisionReport(*_errors(embeds, reference.embeds), None, None)
    kept = outputs["kept_indices"]
    _check_rule(outputs, shape, spec)
    num_tiles, prefix = len(kept), shape.num_prefix_tokens
    rows = np.concatenate([np.tile(np.arange(prefix), (num_tiles, 1)), np.maximum(kept, 0) + prefix], axis=1)
    is_kept = np.concatenate([np.ones((num_tiles, prefix), bool), kept >= 0], axis=1)
    expected = np.take_along_axis(reference.embeds, rows[:, :, None], axis=1) * is_kept[:, :, None]
    return VisionReport(
        *_errors(embeds, expected),
        score_error(outputs["importance"], importance),
        jaccard(kept, select(importance, shape.grid, spec).indices),
    )


def _check_rule(outputs: Mapping[str, NDArray[Any]], shape: VisionShape, spec: PruningSpec) -> None:
    if np.isnan(outputs["importance"]).any():
        raise VerificationError("the vision graph's importance scores hold NaN; choose a higher precision")
    own = select(outputs["importance"], shape.grid, spec)
    if not np.array_equal(outputs["kept_indices"], own.indices) or not np.array_equal(
        outputs["kept_counts"], own.counts
    ):
        raise VerificationError(
            "the vision graph keeps other patches than the rule selects from its own scores; nothing was written. "
            "Report this with the version of onnxruntime"
        )


def _errors(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """The relative error of all, and of the median token: few large tokens can hide the others in a norm."""
    return relative_error(found, expected), float(np.median(row_errors(found, expected)))
