"""How the tokens of an answer are chosen, and how likely they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.engines.bundle import SamplingDefaults


DEFAULT_MAX_NEW_TOKENS = 256
# What a request may ask for; the bounds keep one request from costing the others their time or memory.
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
# Beyond these, logits would overflow; useful ones lie between 1 and 2.
MIN_REPETITION_PENALTY = 0.001
MAX_REPETITION_PENALTY = 1000.0
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
            f"a number from {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}",
            _is_real(self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
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


def _is_whole(value: Any, minimum: int, maximum: int | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return minimum <= int(value) and (maximum is None or int(value) <= maximum)


def _is_real(value: Any, minimum: float, maximum: float) -> bool:
    """Whether a number is in a range; an integer of any length is compared exactly."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return False
    # Not in a narrow type of numpy, in which the largest float would be infinite.
    number = float(value) if isinstance(value, np.floating) else int(value) if isinstance(value, np.integer) else value
    return minimum <= number <= maximum


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
