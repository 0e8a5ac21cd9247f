"""How tokens are chosen: what a caller may set, and what is told of the tokens."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from hivtp.engines.bundle import SamplingDefaults
from hivtp.runtime.language.sampling import SamplingParams, token_logprobs
from hivtp_ops.errors import HivtpError, SettingsError

HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": [0, -1, 1.5, "5", True, None, np.float32(3), np.bool_(True)],
        "temperature": [
            -0.1,
            math.nan,
            math.inf,
            "0.7",
            True,
            HUGE,
            Fraction(1, 2),
            Decimal("0.5"),
            1j,
            np.float32("nan"),
            np.float16("inf"),
            np.float32("inf"),
            np.longdouble("1e400"),
        ],
        "top_p": [0, 1.1, math.nan, HUGE, Fraction(1, 2), np.ones(1)],
        "top_k": [-1, 1.5, False, np.float64(3)],
        "repetition_penalty": [0, -1, math.inf, math.nan, "1.1", HUGE, Fraction(3, 2), 1e-9, 1e9],
        "seed": [-1, 1.0, 2**64, HUGE, True],
        "logprobs": [-1, 21, 1.0, True, HUGE],
        "stop": ["", [""], [1], 3, b"stop", {"a"}, ["a"] * 17, "a" * 257, None],
        "ignores_eos": [1, None, "yes"],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_setting_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=f"^{name} must be ") as raised:
            SamplingParams(**{name: value})
        assert isinstance(raised.value, HivtpError)
        assert isinstance(raised.value, ValueError)
        assert len(str(raised.value)) < 300


def test_a_message_shows_the_value() -> None:
    with pytest.raises(SettingsError, match=r"^top_p must be None or a number above 0 and at most 1, not 1\.1$"):
        SamplingParams(top_p=1.1)
    with pytest.raises(SettingsError, match="not a int that cannot be shown"):
        SamplingParams(temperature=10**5000)


def test_numbers_of_numpy_are_settings() -> None:
    settings = SamplingParams(
        temperature=np.float32(0.5),
        top_p=np.float64(0.9),
        top_k=np.int64(3),
        seed=np.uint64(2**64 - 1),
        max_new_tokens=np.int8(4),
        repetition_penalty=np.float16(1.5),
        logprobs=np.int32(2),
    )
    assert {type(value) for value in vars(settings).values()} == {int, float, tuple, bool}
    assert (settings.temperature, settings.top_k, settings.seed) == (0.5, 3, 2**64 - 1)


def test_what_a_request_leaves_open_comes_from_the_bundle() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=7, repetition_penalty=1.2)
    resolved = SamplingParams(top_k=0, temperature=0, seed=3).resolved(defaults)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.repetition_penalty) == (0, 0.9, 0, 1.2)
    assert (resolved.seed, resolved.max_new_tokens) == (3, SamplingParams().max_new_tokens)


def test_log_probabilities_are_those_before_temperature_and_penalty() -> None:
    import torch

    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(0)
    found = token_logprobs(logits, 7, 5)
    assert found.logprob == pytest.approx(expected[7].item(), rel=1e-9)
    best = expected.topk(5)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), rel=1e-9)
    assert token_logprobs(logits, 7, 0).top == ()
    assert len(token_logprobs(logits[:3], 1, 20).top) == 3


def test_of_equal_log_probabilities_the_lower_token_comes_first() -> None:
    assert [token for token, _ in token_logprobs(np.array([0.0, 1.0, 1.0, 2.0]), 0, 3).top] == [3, 1, 2]
    forbidden = token_logprobs(np.array([0.0, -math.inf]), 0, 2)
    assert forbidden.top == ((0, 0.0), (1, -math.inf))
