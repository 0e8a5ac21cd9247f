from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hivtp.runtime.likelihood import Continuation, Likelihood, _Reader, likelihoods
from hivtp_ops.errors import ImageError, PromptError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline
    from tests.support.reference import HuggingFace


def embeds_of(pipeline: Pipeline, prompt: str, images: list[Path]) -> np.ndarray:
    prepared = pipeline.prepare(prompt, images)
    return pipeline.embed(prepared, pipeline.images.encode(prepared.images))


@pytest.mark.parametrize("name", ["unpruned", "pruned", "exact"])
def test_log_probabilities_are_those_of_hugging_face(
    pipelines: dict[str, Pipeline], hugging_face: HuggingFace, photo: Path, name: str
) -> None:
    pipeline = pipelines[name]
    [found] = likelihoods(pipeline, [Continuation("what is there", [photo], " a dog and a cat")])
    before = embeds_of(pipeline, "what is there", [photo])
    text = pipeline.template.render("what is there", 1) + " a dog and a cat"
    num_before = len(pipeline.prepare("what is there", [photo]).token_ids)
    ids = pipeline.template.encode(pipeline.tokenizer, text, pipeline.image_token_id)[num_before:]
    assert pipeline.tokenizer.decode(ids) == "a dog and a cat"
    logits = torch.from_numpy(hugging_face.logits(np.concatenate([before, pipeline.language.embed(ids)])))
    log_probabilities = logits[len(before) - 1 : -1].log_softmax(dim=-1)
    assert found.log_probabilities == pytest.approx(log_probabilities[range(len(ids)), ids].tolist(), rel=1e-3)
    assert found.is_greedy == (log_probabilities.argmax(dim=-1).tolist() == ids)


def test_what_the_model_writes_itself_is_greedy_and_nothing_else_is(pruned: Pipeline, photo: Path) -> None:
    written = pruned.generate("what", [photo], max_new_tokens=4).token_ids
    other = [*written[:3], (written[3] + 1) % 500 + 3]
    readers = [_Reader(embeds_of(pruned, "what", [photo]), ids) for ids in (written, other)]
    for _ in pruned.language.generate_batch([reader.request() for reader in readers]):
        pass
    greedy, changed = (reader.likelihood() for reader in readers)
    assert (greedy.is_greedy, changed.is_greedy) == (True, False)
    assert greedy.log_probabilities[:3] == pytest.approx(changed.log_probabilities[:3], rel=1e-4)
    assert greedy.log_probabilities[3] > changed.log_probabilities[3]


def test_several_are_judged_as_each_alone(pruned: Pipeline, photo: Path) -> None:
    asked = [
        Continuation("what is there", [photo], " a dog"),
        Continuation("what is there", [photo], " a tree on the road"),
        Continuation("how many", [], " three"),
    ]
    together = likelihoods(pruned, asked)
    for continuation, found in zip(asked, together, strict=True):
        [alone] = likelihoods(pruned, [continuation])
        assert isinstance(alone, Likelihood)
        assert found.log_probabilities == pytest.approx(alone.log_probabilities, rel=1e-3)


def test_one_that_fails_costs_no_other_its_likelihood(pruned: Pipeline, photo: Path) -> None:
    first, second, third, last = likelihoods(
        pruned,
        [
            Continuation("what", ["no-such.png"], " a"),
            Continuation("what", [photo], ""),
            Continuation("what", [photo], " a</s> a"),
            Continuation("what", [photo], " a"),
        ],
    )
    assert isinstance(first, ImageError)
    assert isinstance(second, PromptError)
    assert "has no tokens" in str(second)
    assert isinstance(third, PromptError)
    assert "2 of the continuation's" in str(third)
    assert "an end-of-sequence token stands in it" in str(third)
    assert isinstance(last, Likelihood)


def test_letters_that_the_tokenizer_joins_with_the_prompt_are_judged_with_it(pruned: Pipeline) -> None:
    # The template ends with "ASSISTANT:"; a tokenizer that knew ":x" would write both as one token.
    encode = pruned.tokenizer.encode

    class Joining:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = encode(text, add_special_tokens)
            return [*encode(text.removesuffix("x"), add_special_tokens)[:-1], 77] if text.endswith(":x") else ids

    original, pruned.tokenizer = pruned.tokenizer, Joining()
    try:
        [found] = likelihoods(pruned, [Continuation("what", [], "x")])
    finally:
        pruned.tokenizer = original
    prepared = pruned.prepare("what", [])
    reader = _Reader(pruned.language.embed(prepared.token_ids[:-1]), [77])
    for _ in pruned.language.generate_batch([reader.request()]):
        pass
    assert found == reader.likelihood()


def test_nothing_to_judge_gives_nothing(pruned: Pipeline) -> None:
    assert likelihoods(pruned, []) == []
