"""LLaVA-1.5 with pruning: answers and logits are those of the rule by plain means."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LlavaForConditionalGeneration

from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec
from tests.support.answers import ask
from tests.support.family import (
    EVERYTHING,
    EXACT,
    NUM_NEW,
    PAPER,
    SPECS,
    TEXTS,
    VARYING,
    Family,
    greedy,
    make_family,
    picture,
)


@pytest.mark.parametrize("name", SPECS)
def test_greedy_tokens_are_those_of_the_rule_by_plain_means(llava, model, name):
    inputs = llava.inputs(TEXTS[0], [picture(1)])
    expected, (kept,) = llava.embeds(inputs, SPECS[name])
    with prune(model, SPECS[name]) as pruned:
        assert greedy(model, inputs) == [llava.answer(inputs, SPECS[name])]
        images = pruned.encode(inputs["pixel_values"])
    assert images.kept_indices[0, : images.kept_counts[0]].tolist() == kept
    assert len(images.embeds) == images.is_kept.sum() == len(kept)
    assert expected.shape[1] == inputs["input_ids"].shape[1] - 64 + len(kept)


@pytest.mark.parametrize("seed", [50, 51])
def test_the_tokens_are_those_of_the_bundle(pruned, tiny_checkpoint, seed):
    family = Family(tiny_checkpoint, LlavaForConditionalGeneration)
    request = ask("how many dogs are there?", [picture(seed)], NUM_NEW)
    text = pruned.model.template.render(request.messages, pruned.model.tokenizer)
    with prune(model := family.load(), PAPER):
        tokens = greedy(model, family.inputs(text, [picture(seed)]))
    assert tokens == [pruned.generate(request).token_ids]


def test_the_answer_depends_on_what_is_kept(llava, model):
    answers = set()
    for seed, spec in itertools.product((1, 2), (EVERYTHING, PAPER, EXACT)):
        with prune(model, spec):
            answers.add(tuple(greedy(model, llava.inputs(TEXTS[0], [picture(seed)]))[0]))
    assert len(answers) == 6


@pytest.mark.parametrize("spec", [PAPER, VARYING, EXACT])
def test_a_row_of_a_batch_answers_as_it_does_alone(llava, model, spec):
    images = [picture(seed) for seed in (3, 4, 5, 6)]
    texts = [TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[0]]
    alone = [llava.inputs(text, [image]) for text, image in zip(texts, images, strict=True)]
    inputs = llava.inputs(texts, images)
    with prune(model, spec) as pruned:
        answers = greedy(model, inputs)
        counts = pruned.encode(inputs["pixel_values"]).kept_counts.tolist()
    assert (len(set(counts)) > 1) == (spec == VARYING)
    assert answers == [llava.answer(one, spec) for one in alone]


def test_several_images_in_one_prompt_and_none_in_another(llava, model):
    texts = ["<image> and <image>\nwhat? <image>", "a cat and a dog", TEXTS[0]]
    images = [picture(seed) for seed in (7, 8, 9, 10)]
    batch = llava.inputs(texts, images)
    with prune(model, VARYING):
        answers = greedy(model, batch)
        alone = greedy(model, llava.inputs(texts[1], []))
    assert answers[0] == llava.answer(llava.inputs(texts[0], images[:3]), VARYING)
    assert answers[1:2] == alone == greedy(model, llava.inputs(texts[1], []))
    assert answers[2] == llava.answer(llava.inputs(texts[2], images[3:]), VARYING)


def test_more_tiles_than_fit_into_one_map_are_pruned_alike(llava, model):
    pixels = llava.inputs("<image>" * 11, [picture(seed) for seed in range(11)])["pixel_values"]
    with prune(model, VARYING) as pruned, torch.no_grad():
        images = pruned.encode(pixels)
        alone = [pruned.encode(pixels[index : index + 1]) for index in range(11)]
    assert torch.equal(images.kept_indices, torch.cat([image.kept_indices for image in alone]))
    torch.testing.assert_close(images.importance, torch.cat([image.importance for image in alone]))
    torch.testing.assert_close(images.embeds, torch.cat([image.embeds for image in alone]))


def test_with_every_patch_kept_the_model_is_the_unpruned_one(llava, model):
    inputs = llava.inputs(TEXTS, [picture(11), picture(12)])
    expected = greedy(model, inputs)
    logits = model(**inputs).logits
    with prune(model, EVERYTHING):
        assert greedy(model, inputs) == expected
        assert (model(**inputs).logits - logits)[inputs["attention_mask"] > 0].abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": [-2, 1]},
        {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_other_features_are_pruned_alike(tmp_path, settings):
    family = make_family(tmp_path / "checkpoint", LlavaForConditionalGeneration, **settings)
    images, texts = [picture(13), picture(14)], [TEXTS[0], TEXTS[1]]
    with prune(model := family.load(), VARYING):
        answers = greedy(model, family.inputs(texts, images))
    for answer, text, image in zip(answers, texts, images, strict=True):
        assert answer == family.answer(family.inputs(text, [image]), VARYING)


def test_the_logits_of_a_forward_are_those_of_the_shortened_prompt(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(15)])
    embeds, _ = llava.embeds(inputs, PAPER)
    with torch.no_grad(), prune(model, PAPER):
        logits = model(**inputs).logits
        by_position = model(inputs["input_ids"], inputs["pixel_values"]).logits
        as_tuple = model(**inputs, return_dict=False, logits_to_keep=1)[0]
    expected = llava.reference(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits, by_position)
    torch.testing.assert_close(as_tuple, logits[:, -1:])


def test_the_rows_of_a_forward_are_padded_on_the_left(llava, model):
    images = [picture(3), picture(4), picture(5)]
    inputs = llava.inputs([TEXTS[0], TEXTS[0], TEXTS[0]], images)
    with torch.no_grad(), prune(model, VARYING):
        logits = model(**inputs).logits
        alone = [model(**llava.inputs(TEXTS[0], [image])).logits[0] for image in images]
    assert len({len(row) for row in alone}) > 1
    for row, expected in zip(logits, alone, strict=True):
        torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-4, rtol=1e-4)


def test_labels_follow_the_tokens_and_gradients_reach_the_tower(llava):
    model = llava.load()
    inputs = llava.inputs(TEXTS[0], [picture(16)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with prune(model, PAPER):
        outputs = model(**inputs, labels=labels)
    # The text before and after the image is whole, and the text after it follows an image token as before.
    is_text = labels[0, 1:] != -100
    short = outputs.logits[0, :-1]
    targets = labels[0, 1:][is_text]
    num_after = int((labels[0].flip(0) == -100).nonzero()[0])
    predictions = torch.cat([short[: len(targets) - num_after], short[-num_after:]])
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(predictions, targets))
    outputs.loss.backward()
    for weight in (
        model.model.vision_tower.embeddings.class_embedding,
        model.model.multi_modal_projector.linear_1.weight,
    ):
        assert weight.grad.abs().max() > 0


def test_the_loss_of_a_ragged_batch_is_that_of_its_rows(llava, model):
    images = [picture(3), picture(4), picture(5)]
    batch = llava.inputs([TEXTS[0]] * 3, images)
    with torch.no_grad(), prune(model, VARYING):
        loss = model(**batch, labels=batch["input_ids"]).loss
        sums, counts = [], []
        for image in images:
            inputs = llava.inputs(TEXTS[0], [image])
            outputs = model(**inputs, labels=inputs["input_ids"])
            counts.append(outputs.logits.shape[1] - 1)
            sums.append(outputs.loss * counts[-1])
    assert len(set(counts)) > 1
    torch.testing.assert_close(loss, sum(sums) / sum(counts))


class Watch(TorchFunctionMode):
    """Counts fused attention, and the functions that give something as large as an attention map of the tower."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_fused = 0
        self.map_makers: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        self.num_fused += name == "scaled_dot_product_attention"
        if isinstance(result, torch.Tensor) and result.shape[-2:] == (self.num_tokens, self.num_tokens):
            self.map_makers.append(name)
        return result


def test_only_the_scoring_layers_make_attention_maps(llava, model):
    pixels = llava.inputs(TEXTS[0], [picture(24)])["pixel_values"]
    attention = model.model.vision_tower.config._attn_implementation, model.config._attn_implementation
    assert attention == ("sdpa", "sdpa")
    spec = PruningSpec(first_layer=1, num_layers=2)
    num_runs = dict.fromkeys(range(6), 0)
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: num_runs.update({index: num_runs[index] + 1}))
        for index, layer in enumerate(model.model.vision_tower.encoder.layers)
    ]
    sizes = []
    hooks.append(
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    )
    with torch.no_grad(), prune(model, spec) as pruned, Watch(65) as watch:
        images = pruned.encode(pixels)
        assert (model.model.vision_tower.config._attn_implementation, model.config._attn_implementation) == attention
    for hook in hooks:
        hook.remove()
    # The features are the output of the fifth of six layers.
    assert num_runs == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0}
    assert watch.num_fused == 3
    assert watch.map_makers == ["matmul", "softmax", "to"] * 2
    assert sizes == [(int(images.kept_counts), 48)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_nearly_the_same_patches(llava, model, dtype):
    half = llava.load(dtype=dtype)
    inputs = llava.inputs(TEXTS, [picture(25), picture(26)])
    with torch.no_grad(), prune(half, EXACT) as pruned, prune(model, EXACT) as wide:
        images = pruned.encode(inputs["pixel_values"])
        assert images.embeds.dtype == dtype
        assert images.importance.dtype == torch.float32
        kept, expected = (
            {(tile, index) for tile, row in enumerate(found.kept_indices.tolist()) for index in row}
            for found in (images, wide.encode(inputs["pixel_values"]))
        )
        assert len(kept & expected) / len(kept | expected) > 0.8
        assert half(**inputs).logits.dtype == dtype
        assert [len(answer) for answer in greedy(half, inputs)] == [NUM_NEW, NUM_NEW]
