from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from tests.support.answers import PHOTOS, at_most, load
from tests.support.reference import HuggingFace

if TYPE_CHECKING:
    from pathlib import Path


PROMPTS = ("What is in the picture?", "how many dogs", "Ünïcödé 猫 🐈?")
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def full_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    return make_checkpoint(folder, text={"initializer_range": 0.2}, vision_feature_select_strategy="full")


def rgb(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", PHOTOS)
def test_unpruned_greedy_tokens_equal_transformers(unpruned, hugging_face: HuggingFace, photos, name, prompt):
    answer = unpruned.generate(prompt, [photos / name], at_most(NUM_TOKENS))
    assert answer.token_ids == hugging_face.generate(prompt, [rgb(photos / name)], NUM_TOKENS)
    assert len(answer.token_ids) == NUM_TOKENS
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (64, 64)
    assert answer.kept_indices == [list(range(64))]


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("bundle", ["pruned", "exact", "varying"])
def test_pruned_greedy_tokens_equal_the_same_selection_in_torch(
    pipelines, hugging_face: HuggingFace, photos, bundle, name
):
    pipeline = pipelines[bundle]
    answer = pipeline.generate(PROMPTS[0], [photos / name], at_most(NUM_TOKENS))
    spec = pipeline.model.bundle.manifest.pruning
    tokens, kept = hugging_face.generate_pruned(PROMPTS[0], [rgb(photos / name)], NUM_TOKENS, spec)
    assert answer.token_ids == tokens
    assert answer.kept_indices == kept
    assert (answer.num_image_tokens, answer.num_kept_tokens) == (64, len(kept[0]))


def test_answers_follow_the_picture_the_prompt_and_the_pruning(pipelines, photos):
    """Else the equalities above would prove little."""
    answers = {
        tuple(pipeline.generate(prompt, [photos / name], at_most(NUM_TOKENS)).token_ids)
        for pipeline in pipelines.values()
        for name in PHOTOS
        for prompt in PROMPTS
    }
    assert len(answers) == len(pipelines) * len(PHOTOS) * len(PROMPTS)
    assert all(len(set(tokens)) > 10 for tokens in answers)


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [
        ("Is <image> brighter than <image>?", 2),
        ("<image><image> what colour", 2),
        ("<image> and <image>, or rather <image>", 3),
        ("where is it <image>", 1),
    ],
)
@pytest.mark.parametrize("bundle", ["unpruned", "varying"])
def test_images_stand_where_the_prompt_marks_them(
    pipelines, hugging_face: HuggingFace, photos, bundle, prompt, num_images
):
    pipeline, spec = pipelines[bundle], pipelines[bundle].model.bundle.manifest.pruning
    answers = set()
    for names in (PHOTOS[:num_images], PHOTOS[:num_images][::-1]):
        files = [photos / name for name in names]
        answer = pipeline.generate(prompt, files, at_most(NUM_TOKENS))
        images = [rgb(file) for file in files]
        if spec is None:
            expected, kept = hugging_face.generate(prompt, images, NUM_TOKENS), [list(range(64))] * num_images
        else:
            expected, kept = hugging_face.generate_pruned(prompt, images, NUM_TOKENS, spec)
        assert answer.token_ids == expected
        assert answer.kept_indices == kept
        assert answer.num_image_tokens == 64 * num_images
        assert answer.num_kept_tokens == sum(map(len, kept))
        answers.add(tuple(answer.token_ids))
    assert len(answers) == min(2, num_images)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_only_prompt_equals_transformers(pipelines, hugging_face: HuggingFace, prompt):
    for pipeline in pipelines.values():
        answer = pipeline.generate(prompt, (), at_most(NUM_TOKENS))
        assert answer.token_ids == hugging_face.generate(prompt, [], NUM_TOKENS)
        assert (answer.num_image_tokens, answer.num_kept_tokens, answer.kept_indices) == (0, 0, [])


@pytest.mark.parametrize("is_pruned", [False, True])
def test_the_full_strategy_equals_transformers_and_never_drops_the_cls(
    tmp_path, photos, is_pruned, full_checkpoint: Path
):
    reference = HuggingFace(full_checkpoint)
    settings = ExportSettings(is_pruned=is_pruned, preset="128")
    folder = export_bundle(full_checkpoint, tmp_path / "bundle", settings, is_quiet=True).folder
    pipeline = load(folder)
    assert pipeline.model.bundle.manifest.vision.num_prefix_tokens == 1
    for name in PHOTOS:
        answer = pipeline.generate(PROMPTS[0], [photos / name], at_most(NUM_TOKENS))
        images = [rgb(photos / name)]
        if is_pruned:
            spec = pipeline.model.bundle.manifest.pruning
            expected, kept = reference.generate_pruned(PROMPTS[0], images, NUM_TOKENS, spec)
        else:
            expected, kept = reference.generate(PROMPTS[0], images, NUM_TOKENS), [list(range(64))]
        assert answer.token_ids == expected
        assert answer.kept_indices == kept
        assert (answer.num_image_tokens, answer.num_kept_tokens) == (65, 1 + len(kept[0]))


def test_an_answer_stops_at_an_end_of_sequence_token(unpruned, tiny_checkpoint, tmp_path, photo):
    greedy = unpruned.generate(PROMPTS[0], [photo], at_most(NUM_TOKENS))
    end = next(
        token for index, token in enumerate(greedy.token_ids) if index >= 6 and token not in greedy.token_ids[:index]
    )
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, end]}))

    bundle = export_bundle(folder, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    answer = load(bundle.folder).generate(PROMPTS[0], [photo], at_most(NUM_TOKENS))
    assert answer.token_ids == greedy.token_ids[: greedy.token_ids.index(end) + 1]
    assert (greedy.finish_reason, answer.finish_reason) == ("length", "stop")
    assert answer.token_ids == HuggingFace(folder).generate(PROMPTS[0], [rgb(photo)], NUM_TOKENS)


def test_an_answer_ends_where_the_context_is_full_and_equals_transformers_up_to_there(
    unpruned, hugging_face: HuggingFace, prompt_of
):
    prompt = prompt_of(300)
    answer = unpruned.generate(prompt, (), at_most(100_000))
    assert len(answer.token_ids) == unpruned.model.language.context_length - 300
    assert answer.finish_reason == "length"
    assert answer.token_ids == hugging_face.generate(prompt, [], len(answer.token_ids))
