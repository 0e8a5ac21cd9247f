from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.layers import criteria as layer_criteria
from hivtp.export.layers.criteria import AnswerCriterion, feature_costs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.reference import HuggingFace

END_TOKEN, IMAGE_TOKEN = 2, 511


def sets(*kept: list[int]) -> list[np.ndarray]:
    return [np.array(indices, np.int64) for indices in kept]


def ignore(_done: int, _all: int) -> None:
    """A progress report that nobody reads."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def make_image() -> Callable[[int], np.ndarray]:
    """Image tokens [patches, hidden] that are as large as the model's own token embeddings."""
    return lambda seed: np.random.default_rng(seed).normal(scale=0.5, size=(64, 64)).astype(np.float32)


def test_features_of_known_spread() -> None:
    # Directions (1, 0) three times and (-1, 0): the mean is (0.5, 0), so the spread is 3 * 0.25 + 2.25.
    features = np.array([[1.0, 0], [2, 0], [9, 0], [-3, 0]], np.float32)
    costs = feature_costs(features, sets([0, 1, 2, 3], [3], [0, 1, 2], [0]))
    assert [cost.value for cost in costs] == pytest.approx([0, 0.25, 0.75, 2.75 / 3])
    assert {cost.agreement for cost in costs} == {None}


def test_features_of_rare_things_are_worth_more_than_ground_and_long_tokens() -> None:
    random = np.random.default_rng(0)
    background, thing = random.normal([5, 0, 0], 0.1, (90, 3)), random.normal([0, 5, 0], 0.1, (10, 3))
    background[:10] *= 50
    features = np.concatenate([background, thing]).astype(np.float32)
    of_thing, of_ground, of_long = feature_costs(features, sets([*range(90, 100)], [*range(50, 60)], [*range(10)]))
    assert of_thing.value < 0.2
    assert min(of_ground.value, of_long.value) > 0.9


def test_an_answer_is_what_hugging_face_answers_greedily(
    checkpoint: Checkpoint, hugging_face: HuggingFace, make_image: Callable[[int], np.ndarray]
) -> None:
    criterion = AnswerCriterion(checkpoint, [END_TOKEN], max_answer_tokens=6)
    prompts = [criterion.prompt([1, 70 + seed, IMAGE_TOKEN, 90, 91], make_image(seed), 0) for seed in range(3)]
    table = hugging_face.model.get_input_embeddings().weight.detach().numpy()
    for prompt, answer in zip(prompts, criterion.answer(prompts, ignore), strict=True):
        embeds = prompt.embeds(None, np.empty((0, 64), np.float32))
        assert embeds.shape == (3 + 64 + 1, 64)
        expected = hugging_face.continue_embeds(embeds, 6)
        np.testing.assert_array_equal(answer.embeds, table[expected])
        assert answer.log_probabilities.argmax(axis=1).tolist() == expected


def test_an_answer_ends_at_an_end_token(checkpoint: Checkpoint, make_image: Callable[[int], np.ndarray]) -> None:
    token_ids = [1, 70, IMAGE_TOKEN, 90]
    long = AnswerCriterion(checkpoint, [END_TOKEN], max_answer_tokens=6)
    [answer] = long.answer([long.prompt(token_ids, make_image(0), 0)], ignore)
    second = int(answer.log_probabilities[1].argmax())
    short = AnswerCriterion(checkpoint, [second], max_answer_tokens=6)
    [cut] = short.answer([short.prompt(token_ids, make_image(0), 0)], ignore)
    num_tokens = answer.log_probabilities.argmax(axis=1).tolist().index(second) + 1
    np.testing.assert_array_equal(cut.embeds, answer.embeds[:num_tokens])


def test_a_cost_is_the_divergence_from_the_unpruned_answer(
    checkpoint: Checkpoint, hugging_face: HuggingFace, make_image: Callable[[int], np.ndarray]
) -> None:
    criterion = AnswerCriterion(checkpoint, [END_TOKEN], max_answer_tokens=4)
    image, kept = make_image(0), np.array([3, 4, 60])
    # One token before the patches always stays.
    prompt = criterion.prompt([1, IMAGE_TOKEN, 90], image, num_prefix_tokens=1)
    [answer] = criterion.answer([prompt], ignore)
    [[cost]] = criterion.costs([prompt], [answer], [[kept]], ignore)

    num_tokens, table = len(answer.embeds), hugging_face.model.get_input_embeddings().weight.detach().numpy()

    def log_probabilities(rows: list[int]) -> torch.Tensor:
        embeds = np.concatenate([table[[1]], image[rows], table[[90]], answer.embeds[:-1]])
        return torch.from_numpy(hugging_face.logits(embeds)[-num_tokens:]).log_softmax(dim=-1)

    unpruned, pruned = log_probabilities(list(range(64))), log_probabilities([0, 4, 5, 61])
    expected = kl_div(pruned, unpruned, reduction="none", log_target=True).sum(dim=-1).mean().item()
    assert cost.value == pytest.approx(expected, rel=1e-3)
    assert cost.agreement == (pruned.argmax(dim=-1) == unpruned.argmax(dim=-1)).float().mean().item()


def test_keeping_all_costs_nothing_and_keeping_little_something(
    checkpoint: Checkpoint, make_image: Callable[[int], np.ndarray]
) -> None:
    criterion = AnswerCriterion(checkpoint, [END_TOKEN], max_answer_tokens=4)
    prompts = [criterion.prompt([1, IMAGE_TOKEN, 90 + seed], make_image(seed), 0) for seed in range(2)]
    answers = criterion.answer(prompts, ignore)
    kept = sets(list(range(64)), [0])
    for everything, little in criterion.costs(prompts, answers, [kept, kept], ignore):
        assert (everything.value, everything.agreement) == (pytest.approx(0, abs=1e-6), 1.0)
        assert little.value > 0.01


def test_memory_is_bounded_and_changes_nothing(
    checkpoint: Checkpoint, make_image: Callable[[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = AnswerCriterion(checkpoint, [END_TOKEN], max_answer_tokens=3)
    prompts = [criterion.prompt([1, IMAGE_TOKEN, 90], make_image(seed), 0) for seed in range(3)]
    kept = [sets([1, 2, 3], [5], [7, 8])] * 3

    def run() -> list[float]:
        costs = criterion.costs(prompts, criterion.answer(prompts, ignore), kept, ignore)
        return [cost.value for of_image in costs for cost in of_image]

    at_once = run()
    reference, most = layer_criteria.language_reference, []

    def spy(config: object, read: object, sequences: list[np.ndarray], num_last: list[int]) -> list[np.ndarray]:
        most.append(sum(map(len, sequences)))
        return reference(config, read, sequences, num_last)

    monkeypatch.setattr(layer_criteria, "language_reference", spy)
    monkeypatch.setattr(layer_criteria, "MAX_POSITIONS", 70)
    assert run() == pytest.approx(at_once, rel=1e-4)
    assert len(most) > 6
    assert max(most) <= 70


def test_progress_is_reported(checkpoint: Checkpoint, make_image: Callable[[int], np.ndarray]) -> None:
    criterion = AnswerCriterion(checkpoint, [], max_answer_tokens=2)
    prompts = [criterion.prompt([1, IMAGE_TOKEN, 90], make_image(seed), 0) for seed in range(2)]
    reports: list[tuple[int, int]] = []
    answers = criterion.answer(prompts, lambda *report: reports.append(report))
    criterion.costs(prompts, answers, [sets([1], [2]), sets([3])], lambda *report: reports.append(report))
    assert reports == [(1, 2), (2, 2), (2, 3), (3, 3)]
