"""Calibration: which layers score best, by right answers on pictures that nothing is measured with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.rivals import HiPrune, Hivtp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.accuracy.evaluation import Evaluation

# Of all patches: at a quarter the layers differ, at half most of them will do.
SHARE = 0.25


@dataclass(frozen=True)
class LayerRange:
    """A range of scoring layers, and the share of right answers in percent that HIVTP gives with it."""

    first_layer: int
    num_layers: int
    accuracy: float

    def __str__(self) -> str:
        return range_name(self.first_layer, self.num_layers)


def range_name(first_layer: int, num_layers: int) -> str:
    """A range of layers in words, 0-based."""
    last = first_layer + num_layers - 1
    return f"layer {last}" if num_layers == 1 else f"layers {first_layer}-{last}"


@dataclass(frozen=True)
class Calibration:
    """The layers that were chosen.

    Attributes:
        ranges: every range of the layers that run, best first.
        object_layer: of HiPrune.
        num_pictures: that it was chosen with.
    """

    ranges: Sequence[LayerRange]
    object_layer: int
    num_pictures: int

    @property
    def best(self) -> LayerRange:
        """The range for HIVTP."""
        return self.ranges[0]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self)


def calibrate(evaluation: Evaluation) -> Calibration:
    """Try every range of layers for HIVTP and every layer for HiPrune, each at SHARE of the patches."""
    num_layers, num_patches = evaluation.encoded.received.shape[1:]
    count = round(SHARE * num_patches)

    def accuracy(rule: Hivtp | HiPrune) -> float:
        return 100 * float(evaluation.is_right(rule(evaluation.encoded, count)).mean())

    ranges = [
        LayerRange(first, number, accuracy(Hivtp(first, number)))
        for first in range(num_layers)
        for number in range(1, num_layers - first + 1)
    ]
    ranges.sort(key=lambda item: item.accuracy, reverse=True)
    object_layer = max(range(num_layers), key=lambda layer: accuracy(HiPrune(layer)))
    return Calibration(ranges, object_layer, len(evaluation.pictures))
