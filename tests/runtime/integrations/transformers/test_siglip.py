"""A SigLIP tower with pruning, with and without tiles: answers are those of the rule by plain means."""

from __future__ import annotations

import pytest

from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.integrations.transformers import prune
from tests.support.answers import ask, load
from tests.support.family import EVERYTHING, EXACT, NUM_NEW, SPECS, TEXTS, VARYING, greedy, picture


@pytest.mark.parametrize("name", SPECS)
def test_greedy_tokens_are_those_of_the_rule_by_plain_means(siglip, name):
    inputs = siglip.inputs(TEXTS[0], [picture(1, (150, 60))])
    _, kept = siglip.embeds(inputs, SPECS[name])
    with prune(model := siglip.load(), SPECS[name]) as pruned:
        assert greedy(model, inputs) == [siglip.answer(inputs, SPECS[name])]
        images = pruned.encode(inputs["pixel_values"], inputs.get("image_sizes"))
    pairs = zip(images.kept_indices, images.kept_counts, strict=True)
    assert [row[:count].tolist() for row, count in pairs] == kept


def test_with_every_patch_kept_the_model_is_the_unpruned_one(siglip):
    inputs = siglip.inputs(TEXTS, [picture(11), picture(12)])
    expected = greedy(model := siglip.load(), inputs)
    with prune(model, EVERYTHING):
        assert greedy(model, inputs) == expected


def test_a_row_of_a_batch_answers_as_it_does_alone(siglip):
    images = [picture(seed) for seed in (3, 4)]
    with prune(model := siglip.load(), VARYING):
        answers = greedy(model, siglip.inputs(TEXTS, images))
    for answer, text, image in zip(answers, TEXTS, images, strict=True):
        assert answer == siglip.answer(siglip.inputs(text, [image]), VARYING)


def test_the_tokens_are_those_of_the_bundle(siglip, tmp_path):
    bundle = load(export_bundle(siglip.folder, tmp_path / "bundle", ExportSettings(preset="192"), is_quiet=True).folder)
    request = ask("how many dogs are there?", [picture(50)], NUM_NEW)
    text = bundle.model.template.render(request.messages, bundle.model.tokenizer)
    with prune(model := siglip.load(), EXACT):
        tokens = greedy(model, siglip.inputs(text, [picture(50)]))
    if bundle.model.bundle.manifest.tiling is None:
        # Of 68 px the patches cover 64, and people are shown these.
        [frame] = bundle.model.images.frames(picture(50))
        [view] = bundle.model.images.views((120, 120))
        assert frame.image.size == (64, 64)
        assert view.region == pytest.approx((0, 0, 120 * 64 / 68, 120 * 64 / 68))
    # This answer ends at no eos token, as the model's generation config in these tests has none.
    length = len(bundle.generate(request).token_ids)
    assert tokens[0][:length] == bundle.generate(request).token_ids
