from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.runtime.integrations.lmms_eval.evaluation import MAX_NEW_TOKENS, BenchmarkModel, Question, cut
from hivtp.runtime.likelihood import Continuation, likelihoods
from hivtp_ops.errors import ImageError, PromptError, SettingsError
from tests.support.answers import at_most

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hivtp import Pipeline, Request, SamplingParams

SHORT = {"max_new_tokens": 4}


class Spy:
    """A pipeline whose requests are noted."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.model = pipeline.model
        self.batches: list[list[Request]] = []

    def generate_batch(self, requests: list[Request]) -> list:
        self.batches.append(list(requests))
        return self.pipeline.generate_batch(requests)

    def request(self, settings: dict) -> SamplingParams:
        """How the answer to one question with these settings is sampled."""
        [_] = BenchmarkModel(self).write([Question("a question", "what", settings=SHORT | settings)])
        return self.batches[-1][0].sampling


def test_answers_are_those_of_the_pipeline_whatever_the_batch(pruned: Pipeline, photo: Path) -> None:
    questions = [
        Question("1", "what is there", [photo], SHORT),
        Question("2", "how many", (), SHORT),
        Question("3", "is <image> or <image> red", [photo, photo], SHORT),
        Question("4", "which is red", [photo, photo], SHORT),
        Question("5", "where", [photo], {"max_new_tokens": 6}),
    ]
    expected = [
        pruned.generate("what is there", [photo], at_most(4)),
        pruned.generate("how many", (), at_most(4)),
        pruned.generate("is <image> or <image> red", [photo, photo], at_most(4)),
        # Where the text has no place for several pictures they come first.
        pruned.generate("<image> <image>\nwhich is red", [photo, photo], at_most(4)),
        pruned.generate("where", [photo], at_most(6)),
    ]
    for batch_size in (1, 2, 9):
        spy = Spy(pruned)
        model = BenchmarkModel(spy, batch_size)
        assert list(model.write(questions)) == [answer.text.lstrip() for answer in expected]
        assert max(map(len, spy.batches)) == min(batch_size, 5)
        assert model.num_answers == 5
        assert model.num_image_tokens == sum(answer.num_image_tokens for answer in expected)
        assert 0 < model.num_kept_tokens == sum(answer.num_kept_tokens for answer in expected) < model.num_image_tokens


def test_questions_are_read_batch_by_batch(pruned: Pipeline) -> None:
    num_read = []

    def questions() -> Iterator[Question]:
        for number in range(4):
            num_read.append(number)
            yield Question(str(number), "what", settings=SHORT)

    answers = BenchmarkModel(pruned, batch_size=2).write(questions())
    next(answers)
    assert len(num_read) == 2


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("yes. ASSISTANT: no", ["ASSISTANT:"], "yes. "),
        ("yes\n\nno. end", ["end", "\n\n"], "yes"),
        ("\n\nyes\n\nno", "\n\n", "yes"),
        (" yes", None, "yes"),
        ("yes", ["", "no"], "yes"),
        ("yes", [], "yes"),
    ],
)
def test_until_cuts(text: str, until: str | list[str] | None, expected: str) -> None:
    assert cut(text, until) == expected


def test_the_settings_of_a_task_reach_the_request(pruned: Pipeline) -> None:
    spy = Spy(pruned)
    greedy = spy.request({"temperature": 0, "top_p": 0.0, "num_beams": 1, "do_sample": False, "image_size": 7})
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (0, None, 4)
    assert spy.request({"temperature": 0.7, "do_sample": False}).temperature == 0
    drawn = spy.request({"temperature": 0.7, "top_p": 0.9, "top_k": None, "do_sample": True, "until": ["x"]})
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.7, 0.9, None)
    with pytest.raises(SettingsError, match="a question asks for 4 beams"):
        spy.request({"num_beams": 4})
    with pytest.raises(SettingsError, match="max_new_tokens must be a whole number"):
        spy.request({"max_new_tokens": 1.5})


def test_a_task_without_a_limit_gets_the_usual_one(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pruned, "generate_batch", lambda requests: asked.append(requests[0]) or [PromptError("stop")])
    with pytest.raises(PromptError, match="stop"):
        list(BenchmarkModel(pruned).write([Question("1", "what")]))
    assert asked[0].sampling.max_new_tokens == MAX_NEW_TOKENS


def test_draws_differ_between_questions_and_repeat_with_the_seed(pruned: Pipeline) -> None:
    question = Question("1", "what", settings={"max_new_tokens": 8, "temperature": 1.0})
    first = list(BenchmarkModel(pruned, 2, seed=5).write([question] * 4))
    assert len(set(first)) == 4
    assert list(BenchmarkModel(pruned, 3, seed=5).write([question] * 4)) == first
    assert list(BenchmarkModel(pruned, 2, seed=9).write([question] * 4)) != first


def test_continuations_are_judged_by_their_mean_loss(pruned: Pipeline, photo: Path) -> None:
    questions = [Question("1", "what is there", [photo], continuation=text) for text in (" a dog", " a", " two cats")]
    found = list(BenchmarkModel(pruned, batch_size=2).judge(questions))
    expected = likelihoods(
        pruned.model, [Continuation("what is there", [photo], text) for text in (" a dog", " a", " two cats")]
    )
    assert [loss for loss, _ in found] == pytest.approx(
        [-np.mean(likelihood.log_probabilities) for likelihood in expected], rel=1e-3
    )
    assert [is_greedy for _, is_greedy in found] == [likelihood.is_greedy for likelihood in expected]


@pytest.mark.parametrize(
    ("prompt", "images", "kind", "message"),
    [("what", ["no-such.png"], ImageError, r"no-such\.png"), ("", [], PromptError, "the prompt is empty")],
)
def test_an_error_names_its_question_and_ends_the_run_unless_it_is_skipped(
    pruned: Pipeline, prompt: str, images: list[str], kind: type[Exception], message: str
) -> None:
    bad = Question("document 7 of a task", prompt, images, SHORT, " a")
    for run in (BenchmarkModel(pruned).write, BenchmarkModel(pruned).judge):
        with pytest.raises(kind, match=message) as caught:
            list(run([bad]))
        assert caught.value.__notes__ == ["while answering document 7 of a task"]
    good = Question("2", "what", (), SHORT, " a")
    model = BenchmarkModel(pruned, batch_size=3, skip_errors=True)
    expected = pruned.generate("what", (), at_most(4)).text.lstrip()
    assert list(model.write([good, bad, good])) == [expected, "", expected]
    assert (model.num_errors, model.num_answers) == (1, 2)
    assert next(model.judge([bad])) == (float("inf"), False)


def test_settings_of_a_task_that_cannot_work_are_never_skipped(pruned: Pipeline) -> None:
    model = BenchmarkModel(pruned, skip_errors=True)
    with pytest.raises(SettingsError, match="a question asks for 4 beams") as caught:
        list(model.write([Question("a question", "what", settings={"num_beams": 4})]))
    assert caught.value.__notes__ == ["while answering a question"]


def test_a_batch_size_of_nothing_is_refused(pruned: Pipeline) -> None:
    with pytest.raises(SettingsError, match="batch_size must be 1 or more, not 0"):
        BenchmarkModel(pruned, 0)
