"""The next token from the logits of a language model, greedy or drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.language.sampling import SamplingParams


class Sampler:
    """Chooses the tokens of one request; its draws follow one random stream from `params.seed`.

    Args:
        params: resolved, so that none of its settings is None.
        prompt_ids: the prompt's token ids, which the repetition penalty counts.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = np.unique(np.asarray(prompt_ids, np.int64))

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
        token_id = self._choose(self._penalised(logits))
        if self.params.repetition_penalty != 1:
            self._seen = np.union1d(self._seen, [token_id])
        return token_id

    def _penalised(self, logits: NDArray[Any]) -> NDArray[Any]:
        penalty = self.params.repetition_penalty
        assert penalty is not None, "the params are resolved"
        if penalty == 1:
            return logits
        seen = self._seen[self._seen < logits.size]
        penalised = logits.copy()
        penalised[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        return penalised

    def _choose(self, logits: NDArray[Any]) -> int:
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EngineError(
                f"the largest logit is {logits[best]} (token {best}), so the language model's numbers "
                "overflowed; run its decoder in a wider dtype"
            )
        if self.params.temperature == 0:
            return best
        token_ids, probabilities = filtered_distribution(logits, self.params)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(token_ids[drawn])


def filtered_distribution(
    logits: NDArray[Any], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Apply temperature, then top_k, then top_p, as the logits warpers of transformers do.

    Args:
        logits: [vocab] floats with a finite maximum.
        params: resolved, with a temperature above 0.

    Returns:
        The ids that remain, ascending, [kept] int64, at least one; and their probabilities, [kept] float64.
    """
    temperature, top_k, top_p = params.temperature, params.top_k, params.top_p
    assert temperature is not None, "the params are resolved"
    assert top_k is not None, "the params are resolved"
    assert top_p is not None, "the params are resolved"
    # The maximum is taken off first, so that a small temperature overflows to -inf only.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    token_ids = np.arange(scaled.size)
    if 0 < top_k < scaled.size:
        token_ids = np.flatnonzero(scaled >= np.partition(scaled, -top_k)[-top_k])
    if top_p < 1:
        token_ids = token_ids[_nucleus(scaled[token_ids], top_p)]
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
