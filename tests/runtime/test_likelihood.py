from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hivtp.runtime.generation import decode_together
from hivtp.runtime.likelihood import Continuation, Likelihood, _Reader, likelihoods
from hivtp_ops.errors import ImageError, PromptError
from tests.support.answers import ask, at_most, load

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline
    from tests.support.reference import HuggingFace


@pytest.mark.parametrize("name", ["unpruned", "pruned", "exact"])
def test_log_probabilities_are_those_of_hugging_face(
    pipelines: dict[str, Pipeline], hugging_face: HuggingFace, photo: Path, name: str
) -> None:
    model = pipelines[name].model
    [found] = likelihoods(model, [Continuation("what is there", [photo], " a dog and a cat")])
    request = ask("what is there", [photo])
    prepared = model.prepare(request)
    before = model.embed(model.encode(prepared))
    text = model.template.render(request.messages, model.tokenizer) + " a dog and a cat"
    ids = model.template.encode(model.tokenizer, text, model.manifest.image_token_id)[len(prepared.token_ids) :]
    assert model.tokenizer.decode(ids) == "a dog and a cat"
    logits = torch.from_numpy(hugging_face.logits(np.concatenate([before, model.language.embed(ids)])))
    log_probabilities = logits[len(before) - 1 : -1].log_softmax(dim=-1)
    assert found.log_probabilities == pytest.approx(log_probabilities[range(len(ids)), ids].tolist(), rel=1e-3)
    assert found.is_greedy == (log_probabilities.argmax(dim=-1).tolist() == ids)


def judge(pipeline: Pipeline, images: list[Path], *continuations: list[int]) -> list[Likelihood]:
    """What the model finds of token ids after the prompt "what"."""
    model = pipeline.model
    prompt = model.encode(model.prepare(ask("what", images)))
    readers = [_Reader(model, prompt, ids) for ids in continuations]
    decode_together(model, readers)
    return [reader.likelihood() for reader in readers]


def test_what_the_model_writes_itself_is_greedy_and_nothing_else_is(pruned: Pipeline, photo: Path) -> None:
    answer = pruned.generate("what", [photo], at_most(4, logprobs=0))
    written = answer.token_ids
    other = [*written[:3], (written[3] + 1) % 500 + 3]
    greedy, changed = judge(pruned, [photo], written, other)
    assert (greedy.is_greedy, changed.is_greedy) == (True, False)
    assert greedy.log_probabilities == pytest.approx([entry.logprob for entry in answer.logprobs], rel=1e-4)
    assert greedy.log_probabilities[:3] == pytest.approx(changed.log_probabilities[:3], rel=1e-4)
    assert greedy.log_probabilities[3] > changed.log_probabilities[3]


def test_several_are_judged_as_each_alone(pruned: Pipeline, photo: Path) -> None:
    asked = [
        Continuation("what is there", [photo], " a dog"),
        Continuation("what is there", [photo], " a tree on the road"),
        Continuation("how many", [], " three"),
    ]
    together = likelihoods(pruned.model, asked)
    for continuation, found in zip(asked, together, strict=True):
        [alone] = likelihoods(pruned.model, [continuation])
        assert isinstance(alone, Likelihood)
        assert found.log_probabilities == pytest.approx(alone.log_probabilities, rel=1e-3)
        assert found.is_greedy == alone.is_greedy


def test_one_that_fails_costs_no_other_its_likelihood(pruned: Pipeline, photo: Path) -> None:
    *bad, special, last = likelihoods(
        pruned.model,
        [
            Continuation("what", ["no-such.png"], " a"),
            Continuation("what", [photo], ""),
            Continuation("what", [photo], 3),
            Continuation("what", [photo], "\ud800"),
            Continuation("", [photo], " a"),
            Continuation("what", [], " a" * 600),
            Continuation("what", [photo], " a</s> a"),
            Continuation("what", [photo], " a"),
        ],
    )
    messages = ["no-such.png", "has no tokens", "must be a str, not a int", "not valid Unicode", "the prompt is empty"]
    messages.append("of the continuation's 600 tokens were read: the context is full")
    for error, message in zip(bad, messages, strict=True):
        assert isinstance(error, ImageError if "png" in message else PromptError)
        assert message in str(error)
    # A special token in the text is its letters.
    assert len(special.log_probabilities) > 5
    assert special.log_probabilities[0] == pytest.approx(last.log_probabilities[0], rel=1e-3)
    assert isinstance(last, Likelihood)


def test_letters_that_the_tokenizer_joins_with_the_prompt_are_judged_with_it(pruned_bundle: Path) -> None:
    # The template ends with "ASSISTANT:"; a tokenizer that knew ":x" would write both as one token.
    model = load(pruned_bundle).model
    encode = model.tokenizer.encode

    def joining(text: str, add_special_tokens: bool = True) -> list[int]:
        ids = encode(text, add_special_tokens)
        return [*encode(text.removesuffix("x"), add_special_tokens)[:-1], 77] if text.endswith(":x") else ids

    model.tokenizer.encode = joining
    [found] = likelihoods(model, [Continuation("what", [], "x")])
    embeds = model.language.embed(model.prepare(ask("what")).token_ids[:-1])
    logits = model.language.open_slots(1, len(embeds)).prefill(0, embeds, len(embeds))
    expected = torch.from_numpy(logits).double().log_softmax(0)
    assert found.log_probabilities == pytest.approx([expected[77].item()], rel=1e-6)
    assert found.is_greedy == (int(expected.argmax()) == 77)


def test_nothing_to_judge_gives_nothing(pruned: Pipeline) -> None:
    assert likelihoods(pruned.model, []) == []
