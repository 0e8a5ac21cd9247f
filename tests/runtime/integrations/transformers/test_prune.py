"""A model is pruned and restored, and others stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel

from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec
from hivtp_ops.errors import SettingsError, SpecError
from tests.support.family import EXACT, PAPER, TEXTS, greedy, picture


def state(model: Any) -> dict[str, Any]:
    """Every attribute and every hook of every module."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_restoring_leaves_nothing_behind(request, kind):
    family = request.getfixturevalue(kind)
    model = family.load()
    inputs = family.inputs(TEXTS[0], [picture(21)])
    expected = greedy(model, inputs)
    logits = model(**inputs).logits
    before, classes = state(model), [dict(vars(cls)) for cls in type(model).__mro__]
    pruned = prune(model, PAPER)
    assert greedy(model, inputs) != expected
    model(**inputs)
    assert [dict(vars(cls)) for cls in type(model).__mro__] == classes
    pruned.restore()
    assert state(model) == before
    pruned.restore()
    assert state(model) == before
    assert greedy(model, inputs) == expected
    assert torch.equal(model(**inputs).logits, logits)


def test_a_block_that_fails_restores_too_and_the_model_can_be_pruned_again(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(21)])
    with pytest.raises(RuntimeError, match="stop"), prune(model, PAPER):
        raise RuntimeError("stop")
    with prune(model, EXACT) as first:
        expected = greedy(model, inputs)
    with prune(model, EXACT):
        first.restore()
        assert greedy(model, inputs) == expected == [llava.answer(inputs, EXACT)]


def test_a_generate_of_the_models_own_comes_back(llava):
    model = llava.load()
    calls = []
    own = type(model).generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(model, *args, **kwargs)

    model.generate = generate
    with prune(model, EXACT):
        greedy(model, llava.inputs(TEXTS[0], [picture(22)]))
    assert calls[0]["inputs_embeds"].shape[1] == llava.inputs(TEXTS[0], [picture(22)])["input_ids"].shape[1] - 64 + 21
    assert model.generate is generate


def test_other_models_in_the_process_are_untouched(llava, llava_next, model):
    others = [(family, family.load()) for family in (llava, llava_next)]
    clip = CLIPVisionModel(model.config.vision_config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    inputs = [family.inputs(TEXTS[0], [picture(23)]) for family, _ in others]
    tokens = [greedy(other, one) for (_, other), one in zip(others, inputs, strict=True)]
    states, hidden = [state(other) for _, other in others], clip(pixels).last_hidden_state
    with prune(model, EXACT):
        greedy(model, inputs[0])
        assert [state(other) for _, other in others] == states
        assert [greedy(other, one) for (_, other), one in zip(others, inputs, strict=True)] == tokens
        assert torch.equal(clip(pixels).last_hidden_state, hidden)


def test_models_of_other_classes_are_refused(model):
    with pytest.raises(SettingsError, match="cannot prune a LlavaModel; expected a LlavaForConditionalGeneration"):
        prune(model.model, PAPER)


def test_pruning_twice_is_refused(model):
    with prune(model, PAPER) as pruned:
        with pytest.raises(SettingsError, match="pruned already; call restore"):
            prune(model, PAPER)
        assert model.generate == pruned.generate


def test_a_tower_of_another_kind_is_refused(llava):
    from transformers import ViTConfig, ViTModel

    model = llava.load()
    model.model.vision_tower = ViTModel(ViTConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=2))
    with pytest.raises(SettingsError, match="the vision tower is a ViTModel; the rule is known for a CLIPVisionModel"):
        prune(model, PAPER)


def test_a_strategy_that_drops_the_first_patch_is_refused(siglip):
    model = siglip.load(vision_feature_select_strategy="default")
    with pytest.raises(SettingsError, match="'default' drops the first patch of a SiglipVisionModel"):
        prune(model, PAPER)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PruningSpec.preset("192"), "keep is 192, more than the 64 patches"),
        (PruningSpec(first_layer=5, num_layers=2), "scoring layers 5 to 6 lie outside the encoder"),
        (PruningSpec(window=9), "window is 9, larger than the 8 x 8 grid"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(model, spec, message):
    with pytest.raises(SpecError, match=message):
        prune(model, spec)


def test_unknown_settings_are_refused(llava_next, next_model):
    with pytest.raises(SettingsError, match="newline must be one of kept-rows, all, none, not 'some'"):
        prune(next_model, PAPER, newline="some")
    full = llava_next.load(vision_feature_select_strategy="full")
    with pytest.raises(SettingsError, match="'full' is not supported for LlavaNext"):
        prune(full, PAPER)
