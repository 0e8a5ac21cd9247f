"""The next token from the logits of a language model, greedy or drawn."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import EngineError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.engines.manifest import SamplingDefaults


DEFAULT_MAX_NEW_TOKENS = 256
# What a request may ask for; the bounds keep one request from costing the others their time or memory.
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
REAL_SETTINGS = ("temperature", "top_p", "repetition_penalty")
WHOLE_SETTINGS = ("max_new_tokens", "top_k", "seed", "logprobs")
# What None takes from the bundle.
DEFAULTED_SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and where it ends; the names mean what they mean in transformers.

    Args:
        max_new_tokens: at most this many tokens; fewer where the context ends first.
        temperature: divides the logits; 0 always takes the best token (greedy). None for this, `top_p`, `top_k` and
            `repetition_penalty` takes what the checkpoint's generation config says, which is greedy for most.
        top_p: draw from the fewest best tokens whose probabilities sum to at least this, in (0, 1].
        top_k: draw from this many best tokens, and from those equal to the last of them; 0 is no limit.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that occurred in the prompt
            or the answer; 1 is none.
        seed: of the draws; the same seed gives the same tokens, None others each time.
        stop: strings that end the answer; it is cut before the first of them.
        logprobs: this many most likely tokens are reported with their log probabilities at each position, beside the
            chosen one; 0 reports the chosen one alone, None none.
        ignores_eos: go on after an end-of-sequence token, up to `max_new_tokens`.

    Raises:
        SettingsError: a setting of the wrong type or out of its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    ignores_eos: bool = False

    def __post_init__(self) -> None:
        largest = sys.float_info.max
        self._check("max_new_tokens", "a whole number, 1 or more", _is_whole(self.max_new_tokens, 1))
        self._check_optional("temperature", "a finite number, 0 or more", _is_real(self.temperature, 0, largest))
        self._check_optional("top_p", "a number above 0 and at most 1", _is_real(self.top_p, 0, 1) and self.top_p != 0)
        self._check_optional("top_k", "a whole number, 0 (no limit) or more", _is_whole(self.top_k, 0))
        self._check_optional(
            "repetition_penalty",
            "a finite number above 0",
            _is_real(self.repetition_penalty, 0, largest) and self.repetition_penalty != 0,
        )
        self._check_optional("seed", f"a whole number from 0 to {MAX_SEED}", _is_whole(self.seed, 0, MAX_SEED))
        self._check_optional(
            "logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", _is_whole(self.logprobs, 0, MAX_LOGPROBS)
        )
        self._check("ignores_eos", "True or False", isinstance(self.ignores_eos, bool))
        # As plain numbers from here on: numpy refuses integers beyond its own in arithmetic.
        for names, kind in ((REAL_SETTINGS, float), (WHOLE_SETTINGS, int)):
            for name in names:
                if getattr(self, name) is not None:
                    object.__setattr__(self, name, kind(getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    def resolved(self, defaults: SamplingDefaults) -> SamplingParams:
        """The same with what is None taken from a bundle's defaults."""
        missing = {name: getattr(defaults, name) for name in DEFAULTED_SETTINGS if getattr(self, name) is None}
        return replace(self, **missing)

    def _check_optional(self, name: str, expected: str, is_met: bool) -> None:
        self._check(name, f"None or {expected}", is_met or getattr(self, name) is None)

    def _check(self, name: str, expected: str, is_met: bool) -> None:
        if not is_met:
            raise SettingsError(f"{name} must be {expected}, not {shortened(getattr(self, name))}")


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token and the most likely ones at its position, by the model's own distribution.

    Attributes:
        token_id: the chosen token.
        logprob: natural logarithm of its probability, before temperature, filters and penalties.
        top: the most likely tokens with their log probabilities, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: NDArray[Any], token_id: int, num_top: int) -> TokenLogprobs:
    """The log probabilities at one position.

    Args:
        logits: [vocab] floats with a finite maximum.
        token_id: the chosen token.
        num_top: how many of the most likely tokens.
    """
    shifted = logits.astype(np.float64) - logits.max()
    log_probabilities = shifted - np.log(np.exp(shifted).sum())
    num_top = min(num_top, len(logits))
    best = np.argpartition(-log_probabilities, num_top - 1)[:num_top] if num_top else np.arange(0)
    best = best[np.lexsort((best, -log_probabilities[best]))]
    top = tuple((int(index), float(log_probabilities[index])) for index in best)
    return TokenLogprobs(token_id, float(log_probabilities[token_id]), top)


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


def _is_whole(value: Any, minimum: int, maximum: int | None = None) -> bool:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_whole and bool(value >= minimum and (maximum is None or value <= maximum))


def _is_real(value: Any, minimum: float, maximum: float) -> bool:
    """Whether a number is in a range; an integer of any length is compared exactly."""
    is_number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    return is_number and bool(minimum <= value <= maximum)


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    expected = f"a string, or up to {MAX_STOP_STRINGS} of them, each of 1 to {MAX_STOP_LENGTH} characters"
    if not isinstance(strings, list | tuple) or len(strings) > MAX_STOP_STRINGS:
        raise SettingsError(f"stop must be {expected}, not {shortened(stop)}")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise SettingsError(f"stop must be {expected}; it holds {shortened(string)}")
    return tuple(strings)


def shortened(value: object) -> str:
    """A value for a message, however long it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  an integer of thousands of digits, or whatever a caller handed in
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 100 else f"{text[:100]}..."
