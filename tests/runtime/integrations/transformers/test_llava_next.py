"""LLaVA-NeXT with pruning: answers are those of the rule by plain means, and of the bundle."""

from __future__ import annotations

import pytest
import torch

from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec
from hivtp_ops.errors import PromptError
from tests.support.answers import ask, load
from tests.support.family import EVERYTHING, EXACT, GRID, NUM_NEW, PAPER, SIZES, TEXTS, greedy, picture


@pytest.mark.parametrize("newline", ["kept-rows", "all", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_next_answers_are_those_of_the_rule_by_plain_means(llava_next, next_model, size, newline):
    inputs = llava_next.inputs(TEXTS[0], [picture(30, size)])
    spec = PruningSpec.preset("64", GRID)
    _, kept = llava_next.embeds(inputs, spec, newline)
    with torch.no_grad(), prune(next_model, spec, newline=newline) as pruned:
        images = pruned.encode(inputs["pixel_values"], inputs["image_sizes"])
        assert greedy(next_model, inputs) == [llava_next.answer(inputs, spec, newline)]
    assert [row[row >= 0].tolist() for row in images.kept_indices] == kept
    assert len(images.is_kept) == (inputs["input_ids"] == next_model.config.image_token_id).sum()


@pytest.mark.parametrize(
    ("settings", "spec"),
    [({"preset": "paper"}, PAPER), ({"preset": "192", "newline": "all"}, EXACT), ({"newline": "none"}, PAPER)],
)
def test_next_tokens_are_those_of_the_bundle(llava_next, next_model, tmp_path, settings, spec):
    export = ExportSettings(**settings)
    bundle = load(export_bundle(llava_next.folder, tmp_path / "bundle", export, is_quiet=True).folder)
    prompts = [("how many dogs are there?", [picture(60 + seed, size)]) for seed, size in enumerate(SIZES)]
    prompts.append(("Is <image> brighter than <image>?", [picture(70, SIZES[1]), picture(71, SIZES[2])]))
    answers = set()
    with prune(next_model, spec, newline=export.newline) as pruned:
        for prompt, images in prompts:
            request = ask(prompt, images, NUM_NEW)
            inputs = llava_next.inputs(bundle.model.template.render(request.messages, bundle.model.tokenizer), images)
            [tokens] = greedy(next_model, inputs)
            answer = bundle.generate(request)
            assert tokens == answer.token_ids
            with torch.no_grad():
                kept = pruned.encode(inputs["pixel_values"], inputs["image_sizes"])
            assert [row[row >= 0].tolist() for row in kept.kept_indices] == answer.kept_indices
            assert len(kept.embeds) == answer.num_kept_tokens
            answers.add(tuple(tokens))
    assert len(answers) == len(prompts)


def test_next_never_keeps_the_padding(llava_next, next_model):
    inputs = llava_next.inputs(TEXTS[0], [picture(31, (300, 40))])
    with torch.no_grad(), prune(next_model, EVERYTHING) as pruned:
        images = pruned.encode(inputs["pixel_values"], inputs["image_sizes"])
    is_padding = images.importance == -torch.inf
    assert is_padding[0].sum() == 0
    assert is_padding[1:].sum() > 0
    assert images.kept_counts.tolist() == (~is_padding).sum(dim=1).tolist()


@pytest.mark.parametrize("newline", ["kept-rows", "all"])
def test_next_with_every_patch_kept_is_the_unpruned_model(llava_next, next_model, newline):
    for size in SIZES:
        inputs = llava_next.inputs(TEXTS[0], [picture(32, size)])
        with torch.no_grad():
            expected = greedy(next_model, inputs), next_model(**inputs).logits
            with prune(next_model, EVERYTHING, newline=newline):
                assert greedy(next_model, inputs) == expected[0]
                torch.testing.assert_close(next_model(**inputs).logits, expected[1], atol=1e-4, rtol=1e-4)


def test_next_batches_with_several_images_answer_as_their_rows_do(llava_next, next_model):
    images = [picture(33 + index, size) for index, size in enumerate(SIZES)]
    texts = ["<image> and <image>\nwhat?", TEXTS[1], "a dog", "<image><image> how many"]
    batch = llava_next.inputs(texts, images)
    assert batch["pixel_values"].shape[:2] == (5, 5)
    groups = [images[:2], images[2:3], [], images[3:]]
    with prune(next_model, PAPER):
        answers = greedy(next_model, batch)
        text_only = greedy(next_model, llava_next.inputs(texts[2], []))
    assert answers[2:3] == text_only
    for index in (0, 1, 3):
        assert answers[index] == llava_next.answer(llava_next.inputs(texts[index], groups[index]), PAPER)


def test_next_takes_tiles_in_a_row(llava_next, next_model):
    inputs = llava_next.inputs(TEXTS[0], [picture(34, (150, 60))])
    with torch.no_grad(), prune(next_model, PAPER) as pruned:
        stacked = pruned.encode(inputs["pixel_values"], inputs["image_sizes"])
        in_a_row = pruned.encode(inputs["pixel_values"][0], inputs["image_sizes"].tolist())
    assert torch.equal(stacked.embeds, in_a_row.embeds)


def test_next_tiles_and_sizes_that_differ_are_refused(llava_next, next_model):
    inputs = llava_next.inputs(TEXTS[0], [picture(38, (150, 60))])
    with prune(next_model, PAPER) as pruned:
        with pytest.raises(PromptError, match="holds 2 tiles and image_sizes calls for 4"):
            pruned.encode(inputs["pixel_values"][0, :2], inputs["image_sizes"])
        with pytest.raises(PromptError, match="need image_sizes"):
            pruned.encode(inputs["pixel_values"])
