"""Where an answer ends, and what of its tokens is told: stop strings, eos, log probabilities, defaults of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from hivtp.engines.manifest import SamplingDefaults
from hivtp.runtime.generation import Generation, finished
from hivtp.runtime.language.scheduling.scheduler import Scheduler, SchedulerOptions
from tests.support.answers import PHOTOS, ask, at_most, same, with_language

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Answer, Pipeline
    from tests.support.reference import HuggingFace

PROMPT = "What is in the picture?"
NUM_TOKENS = 30


@pytest.fixture(scope="module")
def free(unpruned: Pipeline, photo: Path) -> Answer:
    """An answer that nothing ends but its length."""
    answer = unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS))
    assert (answer.finish_reason, answer.stop, len(answer.token_ids)) == ("length", None, NUM_TOKENS)
    return answer


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_an_answer_is_cut_before_a_stop_string(unpruned, photo, free, length) -> None:
    """Wherever it stands in the text, within a token or over several."""
    text, certain = unpruned.model.tokenizer.stream(), [""]
    for token_id in free.token_ids[:-1]:
        certain.append(certain[-1] + text.push(token_id))
    for start in range(len(free.text) - length + 1):
        string = free.text[start : start + length]
        stream = unpruned.stream(PROMPT, [photo], at_most(NUM_TOKENS, stop=[string, "never"]))
        pieces = list(stream)
        answer = stream.answer
        assert "".join(pieces) == answer.text == free.text[: free.text.index(string)]
        assert (answer.finish_reason, answer.stop) == ("stop", string)
        # No token comes after the one that completes it.
        num_tokens = next((number for number, before in enumerate(certain) if string in before), NUM_TOKENS)
        assert answer.token_ids == free.token_ids[:num_tokens]


def test_of_several_stop_strings_the_first_that_is_complete_ends_the_answer(unpruned, photo, free) -> None:
    early, late = free.text[4:7], free.text[10:14]
    for stop in ([early, late], (late, early), [late, free.text[3:9], early]):
        answer = unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS, stop=stop))
        assert (answer.text, answer.stop) == (free.text[: free.text.index(early)], early)
    assert unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS, stop=early)).stop == early


def test_text_that_was_held_back_comes_with_the_end(unpruned, photo, free) -> None:
    """What may have been the beginning of a stop string, and was not."""
    stream = unpruned.stream(PROMPT, [photo], at_most(NUM_TOKENS, stop=free.text[-3:] + "!!"))
    pieces = list(stream)
    assert "".join(pieces) == free.text
    assert len(pieces[-1]) >= 3
    assert (stream.answer.finish_reason, stream.answer.stop) == ("length", None)


def test_a_batch_cuts_each_answer_where_it_is_cut_alone(unpruned, photo, free) -> None:
    requests = [ask(PROMPT, [photo], NUM_TOKENS, stop=free.text[start : start + 2]) for start in range(0, 20, 3)]
    for answer, request in zip(unpruned.generate_batch(requests), requests, strict=True):
        assert same(answer, unpruned.generate(request))


def test_an_eos_token_is_the_last_and_one_in_the_last_place_is_a_stop(unpruned, photo, free) -> None:
    eos = free.token_ids[6]
    place = free.token_ids.index(eos)
    ending = with_language(unpruned, eos_token_ids=(2, eos))
    for number in (NUM_TOKENS, place + 1):
        answer = ending.generate(PROMPT, [photo], at_most(number))
        assert (answer.finish_reason, answer.stop) == ("stop", None)
        assert answer.token_ids == free.token_ids[: place + 1]
    assert ending.generate(PROMPT, [photo], at_most(place)).finish_reason == "length"
    ignoring = ending.generate(PROMPT, [photo], at_most(NUM_TOKENS, ignores_eos=True))
    assert (ignoring.token_ids, ignoring.finish_reason) == (free.token_ids, "length")


def test_a_kept_slot_serves_the_same_image_and_no_other(unpruned, photos) -> None:
    """By the keys of a prompt, which know its images apart although their placeholders are one token."""
    model = unpruned.model
    requests = [ask(PROMPT, [photos / name], 8) for name in (*PHOTOS[:2], *PHOTOS[:2])]
    generations = [Generation(model, model.encode(model.prepare(request))) for request in requests]
    options = SchedulerOptions(num_slots=1, capacity=200, keeps_slots=True)
    scheduler, num_prefilled = Scheduler(model.language, options), []
    prefill = scheduler._slots.prefill
    scheduler._slots.prefill = lambda slot, embeds, length: (
        num_prefilled.append(length) or prefill(slot, embeds, length)
    )
    for generation in generations:
        scheduler.add(generation)
        scheduler.run()
    answers = [finished(generation) for generation in generations]
    assert all(same(answer, unpruned.generate(request)) for answer, request in zip(answers, requests, strict=True))
    assert answers[0].token_ids != answers[1].token_ids
    # What they share is the text before the image.
    keys = [generation.keys for generation in generations]
    assert len(keys[0]) == answers[0].num_prompt_tokens == num_prefilled[0]
    num_shared = next(place for place, (one, other) in enumerate(zip(*keys[:2], strict=True)) if one != other)
    assert num_shared < 20
    assert num_prefilled[1:] == [len(keys[0]) - num_shared] * 3


def test_log_probabilities_are_those_of_transformers(unpruned, hugging_face: HuggingFace, photo, free) -> None:
    model = unpruned.model
    prompt = model.embed(model.encode(model.prepare(ask(PROMPT, [photo]))))
    logits = hugging_face.logits(np.concatenate([prompt, model.language.embed(free.token_ids[:-1])]))
    expected = torch.from_numpy(logits[len(prompt) - 1 :]).double().log_softmax(-1)
    for settings in ({}, {"temperature": 0.7, "top_k": 1}):
        answer = unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS, logprobs=3, **settings))
        assert answer.token_ids == [entry.token_id for entry in answer.logprobs] == free.token_ids
        chosen = expected[range(NUM_TOKENS), free.token_ids]
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(chosen.tolist(), rel=1e-3)
        best = expected.topk(3)
        assert [[token for token, _ in entry.top] for entry in answer.logprobs] == best.indices.tolist()
        for entry, values in zip(answer.logprobs, best.values.tolist(), strict=True):
            assert [value for _, value in entry.top] == pytest.approx(values, rel=1e-3)
    assert free.logprobs is None
    alone = unpruned.generate(PROMPT, [photo], at_most(4, logprobs=0)).logprobs
    assert [entry.top for entry in alone] == [()] * 4


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.8])
def test_a_repetition_penalty_gives_the_tokens_of_transformers(unpruned, hugging_face, photo, free, penalty) -> None:
    answer = unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS, repetition_penalty=penalty))
    image = Image.open(photo).convert("RGB")
    assert answer.token_ids == hugging_face.generate(PROMPT, [image], NUM_TOKENS, repetition_penalty=penalty)
    assert answer.token_ids != free.token_ids


def test_a_system_prompt_gives_the_tokens_of_transformers(unpruned, hugging_face, photo, free) -> None:
    image, system = Image.open(photo).convert("RGB"), "the road is red"
    answer = unpruned.generate(PROMPT, [photo], at_most(NUM_TOKENS), system=system)
    assert answer.token_ids == hugging_face.generate(PROMPT, [image], NUM_TOKENS, system=system)
    assert answer.token_ids != free.token_ids
    assert unpruned.chat(system).ask(PROMPT, [photo], at_most(NUM_TOKENS)).token_ids == answer.token_ids


def test_a_request_takes_the_defaults_of_the_bundle_where_it_says_nothing(unpruned, photo, free) -> None:
    defaults = {"temperature": 0.9, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.2}
    sampling = with_language(unpruned, sampling=SamplingDefaults(**defaults))

    def answer(pipeline: Pipeline, **settings: object) -> list[int]:
        return pipeline.generate(PROMPT, [photo], at_most(NUM_TOKENS, **settings)).token_ids

    assert answer(sampling, seed=3) == answer(unpruned, seed=3, **defaults)
    assert answer(sampling, seed=3, top_k=0) == answer(unpruned, seed=3, **defaults | {"top_k": 0})
    assert answer(sampling, temperature=0) == answer(unpruned, repetition_penalty=1.2)
    assert answer(sampling, temperature=0, repetition_penalty=1) == free.token_ids
    assert len({tuple(answer(sampling)) for _ in range(3)}) > 1
