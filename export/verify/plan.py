"""The numeric check that ends every build of a plan: the engine against the ONNX graph that it was built from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.verify.checks import refuse, relative_error
from hivtp.export.verify.samples import sample_patch_mask, sample_pixels
from hivtp.export.verify.vision import VISION_TOLERANCES
from hivtp.runtime.vision.agreement import compare_outputs, score_error
from hivtp_ops.errors import VerificationError
from hivtp_ops.selection import select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from hivtp.engines.base import Arrays, Engine
    from hivtp.engines.manifest import Manifest


@dataclass(frozen=True)
class PlanReport:
    """How far an engine is from the ONNX graph, the worst over all runs.

    Attributes:
        relative_error: of the embeddings of the tokens that both keep, or of all where nothing is pruned.
        importance_error: of the scores, see `score_error`; None where there are none.
        kept_jaccard: least agreement of the kept sets of a run; None where nothing is pruned.
    """

    relative_error: float
    importance_error: float | None
    kept_jaccard: float | None


def verify_plan(
    engine: Engine, reference: Engine, manifest: Manifest, num_tiles: Sequence[int], *, allows_tf32: bool = False
) -> dict[str, Any]:
    """Compare an engine with the ONNX graph on the same generated images.

    The kept patches are checked twice: they must be exactly those that the rule selects from the engine's own scores;
    and they must agree with the graph's. So two kept sets differ only by patches whose scores differ by less than the
    tolerance.

    Args:
        engine: runs the plan.
        reference: runs the graph.
        manifest: describes the graph.
        num_tiles: the sizes of the runs.
        allows_tf32: whether a float32 graph may have run in TF32, which is as coarse as fp16.

    Returns:
        The report and the tolerance, for the sidecar.

    Raises:
        VerificationError: the engine is beyond its tolerance, or keeps what the rule does not.
    """
    precision = "fp16" if allows_tf32 and manifest.vision.precision == "fp32" else manifest.vision.precision
    tolerance = VISION_TOLERANCES[precision]
    reports = []
    for number in num_tiles:
        inputs = _sample_inputs(manifest, reference, number)
        reports.append(_compare(engine.run(inputs), reference.run(inputs), manifest))
    worst = PlanReport(
        max(report.relative_error for report in reports),
        _worst(max, (report.importance_error for report in reports)),
        _worst(min, (report.kept_jaccard for report in reports)),
    )
    refuse(
        "the engine",
        [
            ("relative error", worst.relative_error, "at most", tolerance.relative_error),
            ("importance error", worst.importance_error, "at most", tolerance.importance_error),
            ("kept-token agreement", worst.kept_jaccard, "at least", tolerance.min_jaccard),
        ],
        reference="the ONNX graph",
        advice="Choose a higher precision, or --no-tf32 for a float32 graph",
    )
    return {"is_done": True, "tiles": list(num_tiles), **asdict(worst), "tolerance": asdict(tolerance)}


def _sample_inputs(manifest: Manifest, reference: Engine, num_tiles: int) -> Arrays:
    vision = manifest.vision
    inputs: dict[str, NDArray[Any]] = {"pixel_values": sample_pixels(num_tiles, vision.image_size)}
    if manifest.tiling is not None and manifest.pruning is not None and "kept_indices" in reference.output_names:
        inputs["patch_mask"] = sample_patch_mask(num_tiles, vision.grid)
    return inputs


def _compare(found: Arrays, expected: Arrays, manifest: Manifest) -> PlanReport:
    if "image_embeds" not in expected:
        # An encoder graph: every output but the scores is compared as it is.
        error = max(relative_error(found[name], expected[name]) for name in expected if name != "importance")
        return PlanReport(error, score_error(found["importance"], expected["importance"]), None)
    is_pruned = "kept_indices" in expected
    if is_pruned:
        _check_rule(found, manifest)
    agreement = compare_outputs(found, expected, manifest.vision.num_prefix_tokens)
    return PlanReport(
        agreement.relative_error, agreement.importance_error, agreement.kept_jaccard if is_pruned else None
    )


def _check_rule(found: Arrays, manifest: Manifest) -> None:
    assert manifest.pruning is not None, "a graph that prunes has a spec"
    if np.isnan(found["importance"]).any():
        raise VerificationError("the engine's importance scores hold NaN; choose a higher precision")
    selection = select(found["importance"], manifest.vision.grid, manifest.pruning)
    if not np.array_equal(found["kept_indices"], selection.indices) or not np.array_equal(
        found["kept_counts"], selection.counts
    ):
        raise VerificationError(
            "the engine keeps other patches than the rule selects from its own scores; nothing was written. "
            "Report this with the versions of TensorRT and of the driver"
        )


def _worst(choose: Callable[[Iterable[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None
