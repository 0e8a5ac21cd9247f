from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.miniature.model import answer_logits, make_model, make_tokenizer, normalise, save, vision_states
from benchmarks.miniature.pictures import KINDS, draw
from benchmarks.miniature.train import make_batch

if TYPE_CHECKING:
    from pathlib import Path

SEED = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature") / "checkpoint"
    save(make_model(), folder)
    return folder


def test_every_word_of_questions_and_answers_is_in_the_vocabulary():
    tokenizer = make_tokenizer()
    for seed in range(100):
        for question in draw(seed).questions:
            ids = tokenizer(f"USER: <image>\n{question.text} ASSISTANT: {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids, question


def test_an_answer_is_at_most_two_tokens_and_comes_back_as_it_was():
    tokenizer = make_tokenizer()
    for seed in range(100):
        for question in draw(seed).questions:
            ids = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
            assert 1 <= len(ids) <= 2
            assert tokenizer.decode(ids) == question.answer


def test_a_seed_gives_the_same_first_weights():
    first, again, other = (make_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("column", range(len(KINDS)), ids=KINDS)
def test_the_logits_that_training_sees_are_those_of_transformers(checkpoint, column):
    """Seven questions share one picture in training; transformers asks each of them alone."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    picture, batch = draw(SEED), make_batch(make_tokenizer(), range(SEED, SEED + 2))
    question = picture.questions[column]
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture.image, text=f"{text} {question.answer}", return_tensors="pt")
    with torch.inference_mode():
        opening = torch.tensor(make_tokenizer()("USER:")["input_ids"])
        states = vision_states(model, normalise(batch["pixels"]))
        found = answer_logits(model, states[:, 1:], opening, batch["ids"])[0, column]
        expected = model(**inputs).logits[0, len(opening) + states.shape[1] - 1 :]
    assert torch.allclose(normalise(batch["pixels"])[0], inputs["pixel_values"][0], atol=1e-6)
    assert torch.allclose(found[: len(expected)], expected, atol=1e-5)
    targets = batch["targets"][0, column]
    answer = targets[targets >= 0].tolist()
    assert processor.tokenizer.decode(answer, skip_special_tokens=True) == question.answer
    assert answer[-1] == processor.tokenizer.eos_token_id


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = make_model()
    save(model, tmp_path)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert 0 < sum(sizes) <= 8_000_000


def test_pixels_are_scaled_as_the_image_processor_scales_them(checkpoint):
    from transformers import AutoImageProcessor

    image = draw(SEED).image
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(normalise(torch.from_numpy(np.array(image))[None]), expected, atol=1e-6)
