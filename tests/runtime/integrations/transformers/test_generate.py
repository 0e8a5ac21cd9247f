"""Ways to generate from a pruned model of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from hivtp.runtime.integrations.transformers import prune
from hivtp_ops.errors import PromptError, ScoreError, SettingsError
from tests.support.family import NUM_NEW, PAPER, TEXTS, VARYING, greedy, picture


def test_a_manual_decoding_loop_passes_the_hook(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(17)])
    with torch.no_grad(), prune(model, PAPER):
        outputs = model(**inputs)
        tokens = [outputs.logits[:, -1:].argmax(dim=-1)]
        for _ in range(NUM_NEW - 1):
            outputs = model(input_ids=tokens[-1], past_key_values=outputs.past_key_values)
            tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
    assert torch.cat(tokens, dim=1)[0].tolist() == llava.answer(inputs, PAPER)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_gets_the_whole_prompt_and_the_new_tokens(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(18)])
    recorder = Recorder()
    with prune(model, PAPER):
        answer = greedy(model, inputs, streamer=recorder)[0]
    assert len(answer) == NUM_NEW
    assert recorder.tokens == [*inputs["input_ids"][0].tolist(), *answer, -1]


def test_generating_builds_no_graph_for_gradients(llava, model):
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    with prune(model, PAPER):
        greedy(model, llava.inputs(TEXTS[0], [picture(18)]))
    hook.remove()
    assert seen == [False]


def test_processors_see_the_whole_prompt(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(18)])
    length, seen = inputs["input_ids"].shape[1], []

    def record(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        assert torch.equal(ids[:, :length], inputs["input_ids"])
        return scores

    with prune(model, PAPER):
        greedy(model, inputs, logits_processor=LogitsProcessorList([record]))
    assert seen == [length + step for step in range(NUM_NEW)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_ways_to_generate_work_as_they_do_on_the_shortened_prompt(llava, model, settings):
    inputs = llava.inputs(TEXTS[1], [picture(19)])
    embeds, _ = llava.embeds(inputs, PAPER)
    kept = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id]
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **settings}
    torch.manual_seed(0)
    # Tokens matter to a penalty, and how often an image token occurs does not.
    expected = llava.reference.generate(
        input_ids=torch.cat([kept, torch.full((embeds.shape[1] - len(kept),), model.config.image_token_id)])[None],
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        **settings,
    )[:, embeds.shape[1] :]
    torch.manual_seed(0)
    with prune(model, PAPER):
        outputs = model.generate(**inputs, **settings)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(outputs[:, :length], inputs["input_ids"].expand(len(outputs), -1))
    assert outputs[:, length:].tolist() == expected.tolist()


def test_beams_of_a_ragged_batch_are_those_of_its_rows(llava, model):
    images, texts = [picture(3), picture(4)], [TEXTS[0], TEXTS[1]]
    with prune(model, VARYING):
        together = model.generate(**llava.inputs(texts, images), num_beams=3, max_new_tokens=NUM_NEW)
        for row, text, image in zip(together, texts, images, strict=True):
            alone = model.generate(**llava.inputs(text, [image]), num_beams=3, max_new_tokens=NUM_NEW)[0]
            assert row[-NUM_NEW:].tolist() == alone[-NUM_NEW:].tolist()


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_lengths_count_from_the_prompt_as_it_was_given(llava, model, where, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning", warnings.append)
    inputs = llava.inputs(TEXTS[0], [picture(20)])
    length = inputs["input_ids"].shape[1]
    bounds = {"max_length": length + 5, "min_length": length + 3}
    settings = {"argument": bounds, "config": {"generation_config": GenerationConfig(**bounds)}, "model": {}}[where]
    expected = llava.answer(inputs, PAPER)
    with prune(model, PAPER):
        if where == "model":
            model.generation_config.update(**bounds)
        try:
            outputs = model.generate(**inputs, **settings, do_sample=False)
            # The third new token would end the answer, were it not for min_length.
            ended = model.generate(**inputs, **settings, do_sample=False, eos_token_id=expected[2])
        finally:
            model.generation_config.update(max_length=None, min_length=None)
    assert outputs[0, length:].tolist() == expected[:5]
    assert ended.shape[1] > length + 3
    if where == "argument":
        assert not any("seem to have been set" in warning for warning in warnings)


def test_a_dictionary_of_outputs_is_as_transformers_gives_it(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(20)])
    with prune(model, PAPER):
        outputs = model.generate(
            inputs["input_ids"],
            GenerationConfig(max_new_tokens=3, output_logits=True, return_dict_in_generate=True),
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
        )
    embeds, _ = llava.embeds(inputs, PAPER)
    assert outputs.sequences[0, :-3].tolist() == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(
        outputs.logits[0], llava.reference(inputs_embeds=embeds).logits[:, -1], atol=1e-4, rtol=1e-4
    )
    assert outputs.past_key_values.get_seq_length() == embeds.shape[1] + 2


@pytest.mark.parametrize(
    "settings",
    [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}, {"assistant_model": "itself"}],
    ids=str,
)
def test_ways_to_generate_that_cannot_work_are_refused(llava, model, settings):
    inputs = llava.inputs(TEXTS[0], [picture(35)])
    settings = {name: model if value == "itself" else value for name, value in settings.items()}
    with prune(model, PAPER), pytest.raises(SettingsError, match="cannot be used while the model is pruned"):
        model.generate(**inputs, **settings)


def test_generating_without_a_cache_is_refused(llava):
    model = llava.load().train()
    model.model.language_model.layers[0].gradient_checkpointing = True
    inputs = llava.inputs(TEXTS[0], [picture(35)])
    with prune(model, PAPER):
        with pytest.raises(SettingsError, match=r"gradient checkpointing allows no KV cache"):
            model.generate(**inputs)
        assert greedy(model.eval(), inputs) == [llava.answer(inputs, PAPER)]


def test_inputs_that_do_not_belong_together_are_refused(llava, model):
    inputs = llava.inputs(TEXTS, [picture(36), picture(37)])
    with prune(model, PAPER):
        with pytest.raises(PromptError, match="have 128 image tokens and the images 64 before pruning"):
            model.generate(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
        with pytest.raises(PromptError, match="2 prompts came without attention_mask"):
            model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        with pytest.raises(PromptError, match="images came without input_ids"):
            model(pixel_values=inputs["pixel_values"])
        with pytest.raises(PromptError, match="images came without input_ids"):
            model.generate(pixel_values=inputs["pixel_values"])
        with pytest.raises(SettingsError, match="vision_feature_layer cannot differ"):
            model(**inputs, vision_feature_layer=-1)
        model(**inputs, vision_feature_layer=-2, vision_feature_select_strategy="default")


def test_a_cache_of_a_pruned_prompt_is_not_continued_with_images(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(39)])
    with prune(model, PAPER):
        cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        for pixels in ({"pixel_values": inputs["pixel_values"]}, {}):
            with pytest.raises(SettingsError, match="cannot continue a KV cache"):
                model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    past_key_values=cache,
                    **pixels,
                )


def test_scores_that_hold_nan_are_an_error(llava, model):
    inputs = llava.inputs(TEXTS[0], [picture(40)])
    inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    with prune(model, PAPER), pytest.raises(ScoreError, match="NaN"):
        model.generate(**inputs, max_new_tokens=2)
