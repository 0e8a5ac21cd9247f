from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LogitsProcessorList,
    SiglipVisionModel,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec, select
from hivtp_ops.errors import PromptError, ScoreError, SettingsError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NUM_NEW = 8
GRID = (8, 8)
PAPER = PruningSpec()
EXACT = PruningSpec.preset("192", GRID)
# How many patches stay depends on the picture: 52 to 64 of 64.
VARYING = PruningSpec(global_ratio=0.75)
EVERYTHING = PruningSpec(keep=64)
SPECS = {"paper": PAPER, "exact": EXACT, "varying": VARYING, "layers": PruningSpec(first_layer=0, num_layers=2, keep=9)}
# One for each of the five tile grids of LLaVA-NeXT, in (width, height): square, wide, tall, very wide, very tall.
SIZES = [(120, 120), (150, 60), (50, 130), (300, 40), (30, 280)]
TEXTS = ["USER: <image>\nwhat is this? ASSISTANT:", "USER: <image>\nhow many red houses are there in the photo?"]


def picture(seed: int, size: tuple[int, int] = (120, 120)) -> Image.Image:
    """Blurred blobs of colour."""
    blobs = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


class Family:
    """A checkpoint: models of it, its processor, and what a pruned answer must be by plain means."""

    def __init__(self, folder: Path, kind: type) -> None:
        self.folder = folder
        self.kind = kind
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.pad_token = "<unk>"
        self.processor.tokenizer.padding_side = "left"
        self.reference = self.load()
        self.reference.model.vision_tower.set_attn_implementation("eager")

    def load(self, **settings: Any) -> Any:
        model = self.kind.from_pretrained(self.folder, **{"dtype": torch.float32, **settings}).eval()
        # So that every answer has NUM_NEW tokens.
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, texts: str | Sequence[str], images: Sequence[Any]) -> dict[str, torch.Tensor]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.processor(text=texts, images=list(images) or None, padding=True, return_tensors="pt")

    @torch.no_grad()
    def embeds(
        self, inputs: dict[str, torch.Tensor], spec: PruningSpec, newline: str = "kept-rows"
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Embeddings [1, length, hidden] of one pruned prompt, and the kept patches of each tile."""
        model, config = self.reference, self.reference.config
        tower, side = model.model.vision_tower, config.vision_config.image_size
        pixels, counts = inputs["pixel_values"], [1] * len(inputs["pixel_values"])
        if "image_sizes" in inputs:
            counts = [1 + int(np.prod(self.tile_grid(size))) for size in inputs["image_sizes"]]
            pixels = torch.cat([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])
        outputs = tower(pixels, output_attentions=True, output_hidden_states=True)
        spec = spec.resolve(config.vision_config.num_hidden_layers)
        attentions = outputs.attentions[spec.first_layer : spec.first_layer + spec.num_layers]
        importance = torch.stack(attentions).float().mean(dim=(0, 2, 3))[:, 1:].numpy()

        # Every token of the unpruned sequence as tile * 100 + token, -1 for a newline.
        num_tokens = 1 + (side // config.vision_config.patch_size) ** 2
        ids = [100.0 * tile + torch.arange(num_tokens)[:, None] for tile in range(len(pixels))]
        if "image_sizes" in inputs:
            ids = [
                torch.stack(ids[end - count : end])[:, 1:] for count, end in zip(counts, np.cumsum(counts), strict=True)
            ]
            packed, _ = model.pack_image_features(ids, inputs["image_sizes"], "default", torch.tensor([-1.0]))
        else:
            packed = [tile[config.vision_feature_select_strategy == "default" :] for tile in ids]
        sequence = [int(token) for image in packed for token in image[:, 0]]
        for tile, patch in itertools.product(range(len(pixels)), range(num_tokens - 1)):
            if tile * 100 + patch + 1 not in sequence:
                importance[tile, patch] = -np.inf
        selection = select(importance, GRID, spec)
        kept = [row[:count].tolist() for row, count in zip(selection.indices, selection.counts, strict=True)]

        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        rows: list[torch.Tensor | None] = []
        is_row_kept = False
        for position, token in enumerate(sequence):
            tile, place = divmod(token, 100)
            if token == -1:
                stays = {"kept-rows": is_row_kept, "all": True, "none": False}[newline]
                rows.append(model.model.image_newline if stays else None)
                is_row_kept = False
            else:
                stays = place == 0 or place - 1 in kept[tile]
                rows.append(model.model.multi_modal_projector(features[tile, place]) if stays else None)
                # The base tile has no rows that a newline could follow.
                is_row_kept |= stays and not self.is_base(position, counts, sequence)
        embeds = []
        remaining = iter(rows)
        for token in inputs["input_ids"][0]:
            row = next(remaining) if token == config.image_token_id else model.get_input_embeddings()(token)
            if row is not None:
                embeds.append(row)
        assert next(remaining, "end") == "end"
        return torch.stack(embeds)[None], kept

    def is_base(self, position: int, counts: list[int], sequence: list[int]) -> bool:
        bases = [100 * first for first in np.cumsum([0, *counts])[:-1].tolist()]
        return sequence[position] // 100 * 100 in bases

    def tile_grid(self, image_size: torch.Tensor) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(image_size.tolist(), self.reference.config.image_grid_pinpoints)
        side = self.reference.config.vision_config.image_size
        return height // side, width // side

    @torch.no_grad()
    def answer(self, inputs: dict[str, torch.Tensor], spec: PruningSpec, newline: str = "kept-rows") -> list[int]:
        """Greedy new tokens of one pruned prompt."""
        embeds, _ = self.embeds(inputs, spec, newline)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return self.reference.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False
        )[0].tolist()


def greedy(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[list[int]]:
    """New tokens of each row, once the prompt before them is what it was."""
    outputs = model.generate(**inputs, **{"max_new_tokens": NUM_NEW, "do_sample": False, **settings})
    length = inputs["input_ids"].shape[1]
    assert torch.equal(outputs[:, :length], inputs["input_ids"])
    return outputs[:, length:].tolist()


def make_family(folder: Path, kind: type, **settings: Any) -> Family:
    family = "llava_next" if kind is LlavaNextForConditionalGeneration else "llava"
    # Without it the next token of a model this small follows from the last one alone.
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    return Family(make_checkpoint(folder, "tiny", family=family, text=text, **settings), kind)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llava") / "checkpoint", LlavaForConditionalGeneration)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("next") / "checkpoint", LlavaNextForConditionalGeneration)


@pytest.fixture(scope="module")
def shared_model(llava: Family) -> Any:
    return llava.load()


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """The LLaVA-1.5 under test, which every test must leave as it was."""
    yield shared_model
    assert "generate" not in vars(shared_model)
    assert not shared_model._forward_pre_hooks


@pytest.fixture(scope="module")
def next_model(llava_next: Family) -> Any:
    return llava_next.load()


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
    text = pruned.template.render("how many dogs are there?", 1)
    with prune(model := family.load(), PAPER):
        tokens = greedy(model, family.inputs(text, [picture(seed)]))
    assert tokens == [
        list(pruned.generate("how many dogs are there?", [picture(seed)], max_new_tokens=NUM_NEW).token_ids)
    ]


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
    bundle = Pipeline.load(export_bundle(llava_next.folder, tmp_path / "bundle", export, is_quiet=True).folder)
    prompts = [("how many dogs are there?", [picture(60 + seed, size)]) for seed, size in enumerate(SIZES)]
    prompts.append(("Is <image> brighter than <image>?", [picture(70, SIZES[1]), picture(71, SIZES[2])]))
    answers = set()
    with prune(next_model, spec, newline=export.newline) as pruned:
        for prompt, images in prompts:
            inputs = llava_next.inputs(bundle.template.render(prompt, len(images)), images)
            [tokens] = greedy(next_model, inputs)
            answer = bundle.generate(prompt, images, max_new_tokens=NUM_NEW)
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


def test_models_of_other_classes_are_refused(model):
    with pytest.raises(SettingsError, match="cannot prune a LlavaModel; expected a LlavaForConditionalGeneration"):
        prune(model.model, PAPER)


def test_pruning_twice_is_refused(model):
    with prune(model, PAPER) as pruned:
        with pytest.raises(SettingsError, match="pruned already; call restore"):
            prune(model, PAPER)
        assert model.generate == pruned.generate


def test_a_tower_without_a_cls_is_refused(llava):
    model = llava.load()
    config = model.config.vision_config
    from transformers import SiglipVisionConfig

    model.model.vision_tower = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=48, intermediate_size=80, num_attention_heads=3, num_hidden_layers=2)
    )
    assert config.num_hidden_layers == 6
    with pytest.raises(
        SettingsError, match="the vision tower is a SiglipVisionModel; the rule needs a CLIPVisionModel"
    ):
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


def test_next_tiles_and_sizes_that_differ_are_refused(llava_next, next_model):
    inputs = llava_next.inputs(TEXTS[0], [picture(38, (150, 60))])
    with prune(next_model, PAPER) as pruned:
        with pytest.raises(PromptError, match="holds 2 tiles and image_sizes calls for 4"):
            pruned.encode(inputs["pixel_values"][0, :2], inputs["image_sizes"])
        with pytest.raises(PromptError, match="needs image_sizes"):
            pruned.encode(inputs["pixel_values"])


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
