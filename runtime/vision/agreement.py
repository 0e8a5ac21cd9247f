"""How close the outputs of one vision graph are to those of another: kept patches, embeddings, scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.record import read_record
from hivtp_ops.errors import BundleError, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from hivtp.engines.base import Arrays


_BOUNDS = ("relative_error", "min_jaccard", "importance_error")
# Scores that differ by less than this share of their size do not tell patches apart in any precision.
MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How close one run of a vision graph is to a reference run on the same tiles.

    Attributes:
        kept_jaccard: |A ∩ B| / |A ∪ B| of the kept patches of a tile, the mean over tiles.
        worst_jaccard: the least over tiles.
        relative_error: ||a - b|| / ||b|| of the embeddings of all tokens that both keep; 0 where there are none.
        median_row_error: the same of each such token, the median.
        importance_error: of the scores, see `score_error`; None where one of the two has none.
    """

    kept_jaccard: float
    worst_jaccard: float
    relative_error: float
    median_row_error: float
    importance_error: float | None

    @classmethod
    def over(cls, runs: Sequence[Agreement]) -> Agreement:
        """Several runs in one: the mean and the least agreement, the largest errors, the median of the medians."""
        importance_errors = [run.importance_error for run in runs if run.importance_error is not None]
        return cls(
            kept_jaccard=float(np.mean([run.kept_jaccard for run in runs])),
            worst_jaccard=float(np.min([run.worst_jaccard for run in runs])),
            # Of numpy, where NaN is larger than any number.
            relative_error=float(np.max([run.relative_error for run in runs])),
            median_row_error=float(np.median([run.median_row_error for run in runs])),
            importance_error=float(np.max(importance_errors)) if importance_errors else None,
        )


@dataclass(frozen=True)
class VisionTolerance:
    """How far a vision graph may be from a reference; see Agreement.

    Attributes:
        relative_error: at most.
        min_jaccard: of the mean over tiles, at least.
        importance_error: at most; None does not bound it.
    """

    relative_error: float
    min_jaccard: float
    importance_error: float | None = None

    @classmethod
    def read(cls, verification: Mapping[str, Any]) -> VisionTolerance:
        """The tolerance that a graph or a plan was checked with when it was made.

        Args:
            verification: what the manifest says of the vision graph, or the sidecar of a plan.

        Raises:
            BundleError: it holds no tolerance, or a damaged one.
        """
        try:
            return read_record(cls, {name: verification["tolerance"][name] for name in _BOUNDS}, "tolerance")
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"the bundle does not say how exact its vision graph is ({error}); export it again"
            ) from error

    def loosened(self, other: VisionTolerance) -> VisionTolerance:
        """What two graphs may differ by that each keep to a tolerance of their own: the wider one."""
        is_bounded = self.importance_error is not None and other.importance_error is not None
        return VisionTolerance(
            max(self.relative_error, other.relative_error),
            min(self.min_jaccard, other.min_jaccard),
            max(self.importance_error or 0, other.importance_error or 0) if is_bounded else None,
        )

    def problems(self, found: Agreement) -> list[str]:
        """What is beyond the tolerance, for people; empty where nothing is."""
        checks = [
            ("kept patches agree to", found.kept_jaccard, "at least", self.min_jaccard),
            ("embeddings differ by", found.relative_error, "at most", self.relative_error),
            ("scores differ by", found.importance_error, "at most", self.importance_error),
        ]
        # Written so that NaN is a problem.
        return [
            f"{name} {value:.3g}, allowed is {bound} {limit:.3g}"
            for name, value, bound, limit in checks
            if value is not None
            and limit is not None
            and not (value <= limit if bound == "at most" else value >= limit)
        ]


def compare_outputs(found: Arrays, expected: Arrays, num_prefix_tokens: int) -> Agreement:
    """Compare two runs of vision graphs that prune; a graph that does not prune keeps every patch.

    Args:
        found: outputs of one, by name.
        expected: outputs of the reference on the same tiles. It may keep other patches, or another number of them.
        num_prefix_tokens: tokens before the patches, which are always kept.

    Raises:
        EngineError: the outputs are not those of vision graphs on the same tiles.
    """
    tiles, other_tiles = (list(_kept_rows(outputs, num_prefix_tokens)) for outputs in (found, expected))
    if len(tiles) != len(other_tiles):
        raise EngineError(f"outputs of {len(tiles)} and {len(other_tiles)} tiles cannot be compared")
    jaccards, mine, its = [], [], []
    for (ids, rows), (other_ids, other_rows) in zip(tiles, other_tiles, strict=True):
        common, *places = np.intersect1d(ids, other_ids, return_indices=True)
        num_common = len(common) - num_prefix_tokens
        num_either = len(ids) + len(other_ids) - 2 * num_prefix_tokens - num_common
        jaccards.append(num_common / num_either if num_either else 1.0)
        mine.append(rows[places[0]].astype(np.float64))
        its.append(other_rows[places[1]].astype(np.float64))
    ours, theirs = np.concatenate(mine), np.concatenate(its)
    if ours.shape != theirs.shape:
        raise EngineError(f"embeddings of width {ours.shape[1]} and {theirs.shape[1]} cannot be compared")
    difference = ours - theirs
    row_errors = _ratio(np.linalg.norm(difference, axis=1), np.linalg.norm(theirs, axis=1))
    return Agreement(
        kept_jaccard=float(np.mean(jaccards)),
        worst_jaccard=float(min(jaccards)),
        relative_error=float(_ratio(np.linalg.norm(difference), np.linalg.norm(theirs))),
        median_row_error=float(np.median(row_errors)) if len(row_errors) else 0.0,
        importance_error=_importance_error(found, expected),
    )


def score_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The error of scores [tiles, patches], relative to how much they differ between the patches of a tile.

    ||found - expected|| / ||expected - mean of the tile||, the largest of the tiles: what decides which patches are
    kept is the difference between their scores, not their size. A score of -inf on both sides is no difference.
    """
    errors = []
    for tile, reference in zip(found.astype(np.float64), expected.astype(np.float64), strict=True):
        is_padding = np.isneginf(tile) & np.isneginf(reference)
        tile, reference = tile[~is_padding], reference[~is_padding]
        if not len(reference):
            continue
        spread = np.linalg.norm(reference - reference.mean())
        spread = max(spread, MIN_SPREAD * np.linalg.norm(reference))
        errors.append(float(np.linalg.norm(tile - reference) / spread))
    # Not max(), which passes NaN over.
    return float(np.max(errors, initial=0.0))


def _kept_rows(outputs: Arrays, num_prefix_tokens: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Of each tile an id for every token that it keeps, negative for prefix tokens, and their embeddings."""
    if "image_embeds" not in outputs:
        raise EngineError(f"a graph with the outputs {', '.join(outputs)} gives no embeddings to compare")
    embeds = outputs["image_embeds"]
    prefix = np.arange(-num_prefix_tokens, 0)
    kept, counts = outputs.get("kept_indices"), outputs.get("kept_counts")
    if kept is None or counts is None:
        every_patch = np.arange(embeds.shape[1] - num_prefix_tokens)
        kept, counts = np.tile(every_patch, (len(embeds), 1)), np.full(len(embeds), len(every_patch))
    if embeds.ndim != 3 or kept.shape != (len(embeds), embeds.shape[1] - num_prefix_tokens):
        raise EngineError(
            f"image_embeds of shape {list(embeds.shape)} and kept_indices of shape {list(kept.shape)} are not outputs "
            "of one vision graph; export the bundle again"
        )
    for rows, indices, count in zip(embeds, kept, counts.tolist(), strict=True):
        ids = np.concatenate([prefix, indices[:count]])
        yield ids, rows[: len(ids)]


def _importance_error(found: Arrays, expected: Arrays) -> float | None:
    if "importance" not in found or "importance" not in expected:
        return None
    mine, its = found["importance"], expected["importance"]
    if mine.shape != its.shape:
        raise EngineError(f"scores of shape {list(mine.shape)} and {list(its.shape)} cannot be compared")
    return score_error(mine, its)


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """The quotient, where nothing of nothing is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(part, 0) & np.equal(whole, 0), 0.0, np.divide(part, whole))
