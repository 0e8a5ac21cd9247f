"""The next token from the logits of a language model, greedy or drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import EngineError, SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen; the names mean what they mean in transformers.

    Args:
        temperature: divides the logits; 0 always takes the best token (greedy).
        top_p: draw from the fewest best tokens whose probabilities sum to at least this, in (0, 1].
        top_k: draw from this many best tokens, and from those equal to the last of them; 0 is no limit.
        seed: of the draws; the same seed gives the same tokens, None others each time.

    Raises:
        SettingsError: a setting of the wrong type or out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature, Real) and 0 <= self.temperature < math.inf):
            raise SettingsError(f"temperature must be a finite number, 0 or more, not {self.temperature!r}")
        if not (_is_number(self.top_p, Real) and 0 < self.top_p <= 1):
            raise SettingsError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r}")
        if not (_is_number(self.top_k, Integral) and self.top_k >= 0):
            raise SettingsError(f"top_k must be a whole number, 0 (no limit) or more, not {self.top_k!r}")
        if self.seed is not None and not (_is_number(self.seed, Integral) and self.seed >= 0):
            raise SettingsError(f"seed must be None or a whole number, 0 or more, not {self.seed!r}")


class Sampler:
    """Chooses the tokens of one request; its draws follow one random stream from `settings.seed`."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)

    def __call__(self, logits: NDArray[Any]) -> int:
        """Choose the next token.

        Args:
            logits: [vocab] of any float dtype; -inf forbids a token.

        Returns:
            The id of the token. Greedy takes the lowest id among equal maxima.

        Raises:
            EngineError: the logits are not [vocab] floats, hold NaN or +inf, or forbid every token.
        """
        if logits.ndim != 1 or logits.size == 0 or not np.issubdtype(logits.dtype, np.floating):
            raise EngineError(f"logits must be [vocab] floats, not {logits.dtype} of shape {logits.shape}")
        if logits.dtype == np.float16:
            logits = logits.astype(np.float32)  # numpy's argmax is 50 times slower in float16
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EngineError(
                f"the largest logit is {logits[best]} (token {best}), so the language model's numbers "
                "overflowed; run its decoder in a wider dtype"
            )
        if self.settings.temperature == 0:
            return best
        token_ids, probabilities = filtered_distribution(logits, self.settings)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(token_ids[drawn])


def filtered_distribution(
    logits: NDArray[Any], settings: SamplingSettings
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Apply temperature, then top_k, then top_p, as the logits warpers of transformers do.

    Args:
        logits: [vocab] floats with a finite maximum.
        settings: with a temperature above 0.

    Returns:
        The ids that remain, ascending, [kept] int64, at least one; and their probabilities, [kept] float64.
    """
    # The maximum is taken off first, so that a small temperature overflows to -inf only.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / settings.temperature
    token_ids = np.arange(scaled.size)
    if 0 < settings.top_k < scaled.size:
        token_ids = np.flatnonzero(scaled >= np.partition(scaled, -settings.top_k)[-settings.top_k])
    if settings.top_p < 1:
        token_ids = token_ids[_nucleus(scaled[token_ids], settings.top_p)]
    weights = np.exp(scaled[token_ids])
    return token_ids, weights / weights.sum()


def _nucleus(scaled: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the positions that top_p keeps, ascending.

    transformers sorts ascending and drops tokens while what is dropped sums to at most 1 - top_p, all but
    the last. Among equals the lower positions go first, as in a stable sort. Sorting only the values says
    the same and is several times faster than sorting positions.
    """
    ascending = np.sort(scaled)
    weights = np.exp(ascending)
    cumulative = np.cumsum(weights / weights.sum())
    num_dropped = min(int(np.searchsorted(cumulative, 1 - top_p, side="right")), scaled.size - 1)
    threshold = ascending[num_dropped]
    is_kept = scaled >= threshold
    num_equal_dropped = num_dropped - int(np.searchsorted(ascending, threshold, side="left"))
    is_kept[np.flatnonzero(scaled == threshold)[:num_equal_dropped]] = False
    return np.flatnonzero(is_kept)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
