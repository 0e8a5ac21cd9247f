from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hivtp.engines.bundle import SamplingDefaults
from hivtp.runtime.language.sampler import Sampler, filtered_distribution
from hivtp.runtime.language.sampling import SamplingParams
from hivtp_ops.errors import EngineError


def params(**settings: Any) -> SamplingParams:
    """Greedy where nothing else is said."""
    return SamplingParams(**settings).resolved(SamplingDefaults())


SETTINGS = [
    params(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature in (0.2, 1.0, 1.7)
    for top_k in (0, 1, 5, 40, 10**6)
    for top_p in (1.0, 0.95, 0.5, 0.01)
]


def _dense(logits: np.ndarray, settings: SamplingParams) -> np.ndarray:
    token_ids, probabilities = filtered_distribution(logits, settings)
    assert (np.diff(token_ids) > 0).all()
    dense = np.zeros(logits.size)
    dense[token_ids] = probabilities
    return dense


def _reference(logits: np.ndarray, settings: SamplingParams) -> np.ndarray:
    """The distribution of transformers, in float64, so that no rounding decides what is kept."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(float(settings.temperature))(ids, scores)
    if settings.top_k > 0:
        scores = TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(ids, scores)
    distribution: np.ndarray = scores.softmax(-1)[0].numpy()
    return distribution


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings: SamplingParams) -> None:
    generator = np.random.default_rng(0)
    for vocab in (1, 2, 300, 4000):
        logits = (generator.normal(size=vocab) * 3).astype(np.float32)
        expected = _reference(logits, settings)
        actual = _dense(logits, settings)
        np.testing.assert_array_equal(actual > 0, expected > 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_many_ties_are_kept_as_in_transformers(settings: SamplingParams) -> None:
    # Which of them are kept is left open there: in long rows torch.sort is not stable.
    logits = (np.random.default_rng(0).normal(size=4000) * 3).astype(np.float16)
    assert np.unique(logits).size < logits.size
    actual, expected = _dense(logits, settings), _reference(logits, settings)
    np.testing.assert_allclose(np.sort(actual), np.sort(expected), rtol=1e-9, atol=1e-15)


@hypothesis_settings(deadline=None, max_examples=300)
@given(
    values=st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.3, 2.0]), max_size=15),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.013, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
)
def test_ties_in_short_rows_are_kept_as_in_transformers(
    values: list[float], top_k: int, top_p: float, temperature: float
) -> None:
    logits = np.array([*values, 1.0])
    settings = params(temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(_dense(logits, settings), _reference(logits, settings), rtol=1e-9, atol=1e-15)


def test_top_k_keeps_what_equals_the_last_of_them() -> None:
    token_ids, probabilities = filtered_distribution(
        np.array([1.0, 3.0, 2.0, 2.0, 0.0]), params(temperature=1, top_k=2)
    )
    assert token_ids.tolist() == [1, 2, 3]
    assert probabilities.sum() == pytest.approx(1)


def test_top_p_stops_where_the_sum_is_reached() -> None:
    logits, settings = np.zeros(4), params(temperature=1, top_p=0.5)
    assert filtered_distribution(logits, settings)[0].tolist() == [2, 3]
    assert np.flatnonzero(_reference(logits, settings)).tolist() == [2, 3]


def test_top_p_keeps_at_least_the_best_token() -> None:
    token_ids, probabilities = filtered_distribution(np.array([0.0, 0.1, 0.0]), params(temperature=1, top_p=1e-17))
    assert token_ids.tolist() == [1]
    assert probabilities.tolist() == [1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_greedy_takes_the_lowest_of_equal_maxima(dtype: Any) -> None:
    assert Sampler(params())(np.array([0, 2, 1, 2, -np.inf], dtype)) == 1


@hypothesis_settings(deadline=None, max_examples=50)
@given(logits=hnp.arrays(np.float32, 50, elements=st.floats(-60000, 60000, width=32)))
def test_greedy_is_argmax(logits: np.ndarray) -> None:
    token = Sampler(params())(logits)
    assert type(token) is int
    assert token == np.argmax(logits)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = np.array([1.0, -3.0, 1.5, 60000.0, -60000.0], np.float32)
    assert Sampler(params(temperature=temperature))(logits) == 3


@pytest.mark.parametrize(
    "settings",
    [
        params(temperature=1.0, seed=7),
        params(temperature=0.7, top_k=6, seed=7),
        params(temperature=1.3, top_p=0.8, seed=7),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_are_probable(settings: SamplingParams) -> None:
    logits = np.random.default_rng(1).normal(size=12)
    num_draws = 20_000
    sampler = Sampler(settings)
    counts = np.bincount([sampler(logits) for _ in range(num_draws)], minlength=12)
    expected = _reference(logits, settings)
    assert (counts[expected == 0] == 0).all()
    standard_error = np.sqrt(expected * (1 - expected) / num_draws)
    assert (np.abs(counts / num_draws - expected) <= 4.5 * standard_error).all()


def test_a_seed_fixes_the_tokens_of_a_request() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = (Sampler(params(temperature=1, seed=3)) for _ in range(2))
    tokens = [first(logits) for _ in range(20)]
    assert tokens == [second(logits) for _ in range(20)]
    assert len(set(tokens)) > 10


@pytest.mark.parametrize("seed", [4, None])
def test_another_seed_or_none_gives_other_tokens(seed: int | None) -> None:
    logits = np.zeros(1000, np.float32)
    first = Sampler(params(temperature=1, seed=3))
    second = Sampler(params(temperature=1, seed=seed))
    assert [first(logits) for _ in range(20)] != [second(logits) for _ in range(20)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_forbidden_token_is_never_taken(temperature: float) -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    sampler = Sampler(params(temperature=temperature, seed=0))
    assert {sampler(logits) for _ in range(100)} <= {1, 3}


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = np.arange(50, dtype=np.float32)
    logits.flags.writeable = False
    Sampler(params(temperature=2, top_k=10, top_p=0.9))(logits)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "logits",
    [
        np.array([0.0, math.nan, 5.0]),
        np.array([0.0, math.inf, 5.0], np.float16),
        np.full(4, -math.inf),
        np.full(4, math.nan, np.float32),
        np.zeros((1, 4)),
        np.zeros(0),
        np.zeros(4, np.int64),
    ],
    ids=str,
)
def test_logits_that_cannot_be_right_are_refused(logits: np.ndarray, temperature: float) -> None:
    with pytest.raises(EngineError, match="logit"):
        Sampler(params(temperature=temperature))(logits)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = np.random.default_rng(0)
    prompt = generator.integers(0, 40, 25).tolist()
    sampler, ids = Sampler(params(repetition_penalty=penalty), prompt), list(prompt)
    found, expected, plain = [], [], []
    for _ in range(60):
        # Many are equal, so that a token is soon passed by another.
        logits = generator.normal(size=60).round(1).astype(np.float32)
        scores = torch.from_numpy(logits)[None]
        processed = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), scores.clone())
        expected.append(int(processed.argmax()))
        plain.append(int(scores.argmax()))
        found.append(sampler(logits))
        ids.append(found[-1])
    assert found == expected
    assert (found == plain) == (penalty == 1)


@pytest.mark.parametrize(
    ("settings", "limit_ms"),
    [
        (params(), 1),
        (params(temperature=1.0), 3),
        (params(temperature=0.7, top_p=0.9), 3),
        (params(temperature=0.7, top_k=50), 3),
        (params(temperature=0.7, top_k=50, top_p=0.9), 3),
    ],
    ids=str,
)
def test_a_token_of_32k_takes_little_time(settings: SamplingParams, limit_ms: float) -> None:
    logits = np.random.default_rng(0).normal(size=32_000).astype(np.float32)
    sampler = Sampler(settings)
    durations_ms = []
    for _ in range(20):
        start = time.perf_counter()
        sampler(logits)
        durations_ms.append((time.perf_counter() - start) * 1e3)
    assert min(durations_ms) < limit_ms
