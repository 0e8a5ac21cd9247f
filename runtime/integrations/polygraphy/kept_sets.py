"""A comparison for Polygraphy that understands kept sets: embeddings are compared patch by patch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.polygraphy.base import (
    BaseCompareFunc,
    CompareResult,
    Encoder,
    Threshold,
    polygraphy_errors,
)
from hivtp.runtime.integrations.polygraphy.images import find_bundle
from hivtp.runtime.vision.agreement import Agreement, VisionTolerance, compare_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping


class KeptSetsThreshold(Threshold):  # type: ignore[misc]  # Polygraphy ships no types
    """A VisionTolerance as Polygraphy has it."""

    METRIC_FIELDS = [field.name for field in fields(Agreement)]  # noqa: RUF012  Polygraphy's own interface

    def __init__(self, tolerance: VisionTolerance) -> None:
        self.tolerance = tolerance

    def passed(self, metric_values: Mapping[str, float]) -> bool:
        """Whether an agreement is within the tolerance."""
        return not self.tolerance.problems(Agreement(**metric_values))

    def describe(self, metric_values: Mapping[str, float]) -> tuple[str, bool]:
        """A line for people, and whether it is good news."""
        found = Agreement(**metric_values)
        problems = self.tolerance.problems(found)
        importance = "" if found.importance_error is None else f", scores {found.importance_error:.2e}"
        line = (
            f"kept patches agree to {found.kept_jaccard:.3f} (worst tile {found.worst_jaccard:.3f}); errors: "
            f"embeddings {found.relative_error:.2e} (median token {found.median_row_error:.2e}){importance}"
        )
        return f"{line} | {'FAILED: ' + '; '.join(problems) if problems else 'PASSED'}", not problems


class KeptSetsResult(CompareResult):  # type: ignore[misc]
    """An Agreement as Polygraphy has it: true where it is within its threshold."""

    _THRESHOLD_CLASS = KeptSetsThreshold

    def __init__(self, thresholds: KeptSetsThreshold | None = None, **values: float | None) -> None:
        super().__init__(thresholds=thresholds)
        # Polygraphy reads each value as an attribute.
        self.__dict__.update(values)


class KeptSets(BaseCompareFunc):  # type: ignore[misc]
    """Compares the outputs of two runners of vision graphs; the second is the reference.

    Args:
        num_prefix_tokens: tokens before the patches.
        tolerance: what is allowed.
    """

    _RESULT_CLASS = KeptSetsResult

    def __init__(self, num_prefix_tokens: int, tolerance: VisionTolerance) -> None:
        self._num_prefix_tokens = num_prefix_tokens
        self._tolerance = tolerance

    @classmethod
    def of_bundle(cls, model: str, **bounds: float) -> KeptSets:
        """The comparison for the bundle that a file lies in.

        Args:
            model: the vision graph of a bundle, one of its plans, or its folder.
            bounds: in place of those in its manifest; see VisionTolerance.
        """
        with polygraphy_errors():
            manifest = find_bundle(model).manifest
            tolerance = VisionTolerance.read(manifest.verification.get("vision", {}))
            return cls(manifest.vision.num_prefix_tokens, replace(tolerance, **bounds))

    def __call__(self, iter_result0: Mapping[str, Any], iter_result1: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Compare one run: a result under the name of the embeddings."""
        from polygraphy.logger import G_LOGGER

        with polygraphy_errors():
            found = compare_outputs(dict(iter_result0.items()), dict(iter_result1.items()), self._num_prefix_tokens)
        result = KeptSetsResult(thresholds=self.thresholds_for("image_embeds"), **asdict(found))
        line, is_passed = result.describe()
        (G_LOGGER.finish if is_passed else G_LOGGER.error)(line)
        return OrderedDict(image_embeds=result)

    def thresholds_for(self, output_name: str) -> KeptSetsThreshold:  # noqa: ARG002  one result for all outputs
        """What the result is checked against."""
        return KeptSetsThreshold(self._tolerance)


if Encoder is not None:
    # For --save-accuracy-results.
    Encoder.register(KeptSetsThreshold)(lambda threshold: asdict(threshold.tolerance))
    Encoder.register(KeptSetsResult)(lambda result: {**result.metric_values(), "thresholds": result.thresholds})
