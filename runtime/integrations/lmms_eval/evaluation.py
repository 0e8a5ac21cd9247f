"""The questions of a benchmark, answered by a pipeline in batches: texts, and likelihoods of given texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hivtp.runtime.attempt import attempt
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.likelihood import Continuation, likelihoods
from hivtp.runtime.request import IMAGE_MARK, Request
from hivtp_ops.errors import HivtpError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.pipeline import Pipeline

T = TypeVar("T")

# Where a task names no limit; what the models of lmms-eval take.
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Args:
        source: which it is, for error messages.
        prompt: the text, with one image token per image where they belong, or with none: then they come first.
        images: as `Pipeline.stream` takes them.
        settings: what the task says of the answer: `until`, `max_new_tokens`, `do_sample`, `temperature`, `top_p`,
            `top_k`, `num_beams`. Anything else in it concerns other models.
        continuation: the text to judge; None where the model is to write.
    """

    source: str
    prompt: str
    images: Sequence[ImageSource] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    continuation: str | None = None


class BenchmarkModel:
    """A pipeline that is evaluated.

    Args:
        pipeline: of the bundle.
        batch_size: questions that are answered together.
        seed: of the first draws, where a task samples; every further question takes the next number.
        skip_errors: a question that fails gets an empty answer, in place of ending the run.

    Attributes:
        num_answers: texts written so far.
        num_errors: questions that failed so far.
        num_image_tokens: of those texts' images, before pruning.
        num_kept_tokens: of those texts' images, as the language model saw them.

    Raises:
        SettingsError: the batch size cannot work.
    """

    def __init__(self, pipeline: Pipeline, batch_size: int = 1, seed: int = 0, *, skip_errors: bool = False) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size must be 1 or more, not {batch_size}")
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.seed = seed
        self.skip_errors = skip_errors
        self.num_answers = self.num_errors = self.num_image_tokens = self.num_kept_tokens = 0

    def write(self, questions: Iterable[Question]) -> Iterator[str]:
        """The answer to each question, cut before the first of its `until` texts.

        Raises:
            HivtpError: what `Pipeline.stream` raises, unless errors are skipped.
            SettingsError: a task asks for beam search, or for settings that cannot work.
        """
        for batch in _batches(questions, self.batch_size):
            requests = [attempt(self._request, question, self.seed + index) for index, question in enumerate(batch)]
            self.seed += len(batch)
            good = [request for request in requests if not isinstance(request, HivtpError)]
            results = iter(self.pipeline.generate_batch(good))
            for question, request in zip(batch, requests, strict=True):
                answer = self._checked(question, request if isinstance(request, HivtpError) else next(results))
                if answer is None:
                    yield ""
                    continue
                self.num_answers += 1
                self.num_image_tokens += answer.num_image_tokens
                self.num_kept_tokens += answer.num_kept_tokens
                yield cut(answer.text, question.settings.get("until"))

    def judge(self, questions: Iterable[Question]) -> Iterator[tuple[float, bool]]:
        """The mean negative log-likelihood per token of each continuation, and whether it is the greedy answer.

        A question whose error is skipped is infinitely unlikely.

        Raises:
            HivtpError: what `likelihoods` gives, unless errors are skipped.
        """
        for batch in _batches(questions, self.batch_size):
            continuations = [
                Continuation(self._prompt(question), question.images, question.continuation or "") for question in batch
            ]
            for question, result in zip(batch, likelihoods(self.pipeline.model, continuations), strict=True):
                found = self._checked(question, result)
                if found is None:
                    yield float("inf"), False
                else:
                    yield -float(np.mean(found.log_probabilities)), found.is_greedy

    def _request(self, question: Question, seed: int) -> Request:
        given = {name: value for name, value in question.settings.items() if value is not None}
        if given.get("num_beams", 1) > 1:
            raise SettingsError(
                f"{question.source} asks for {given['num_beams']} beams, and a bundle decodes one sequence; "
                "set num_beams to 1"
            )
        settings: dict[str, Any] = {"max_new_tokens": given.get("max_new_tokens", MAX_NEW_TOKENS), "temperature": 0}
        if given.get("do_sample", True) and given.get("temperature", 0) > 0:
            settings |= {name: given[name] for name in ("temperature", "top_p", "top_k") if name in given}
        return Request(self._prompt(question), question.images, SamplingParams(seed=seed, **settings))

    def _prompt(self, question: Question) -> str:
        """The text with its image tokens; a single image needs none."""
        num_images = len(question.images)
        if num_images < 2 or IMAGE_MARK in question.prompt:
            return question.prompt
        return f"{' '.join([IMAGE_MARK] * num_images)}\n{question.prompt}"

    def _checked(self, question: Question, result: T | HivtpError) -> T | None:
        """A result; None for an error that is skipped."""
        if not isinstance(result, HivtpError):
            return result
        self.num_errors += 1
        # Settings are those of a whole task.
        if not self.skip_errors or isinstance(result, SettingsError):
            result.add_note(f"while answering {question.source}")
            raise result
        return None


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the `until` texts; one in front of all words ends nothing."""
    ends = [until] if isinstance(until, str) else until or []
    text = text.lstrip()
    found = [text.find(end) for end in ends if end]
    return text[: min((place for place in found if place >= 0), default=len(text))]


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
