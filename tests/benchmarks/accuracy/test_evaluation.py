from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.accuracy import evaluation as module
from benchmarks.accuracy.evaluation import MAX_ANSWER, Evaluation
from benchmarks.accuracy.rivals import Hivtp, random_patches
from benchmarks.miniature.pictures import HELD_OUT, KINDS
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.verify.reference import vision_reference
from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NUM_PATCHES = 144
CASES = {
    "all": (Hivtp(2, 2), NUM_PATCHES),
    "half": (Hivtp(2, 2), 72),
    # How many patches stay depends on the picture.
    "varying": (Hivtp(2, 2, is_exact=False, overrides={"global_ratio": 0.8}), 72),
}


def right_answers(evaluation: Evaluation) -> NDArray[np.object_]:
    return np.array(
        [[question.answer for question in picture.questions] for picture in evaluation.pictures], dtype=object
    )


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_pruned_transformers_model(
    evaluation: Evaluation, untrained_miniature: Path, case: str
) -> None:
    rule, count = CASES[case]
    answers = evaluation.answers(rule(evaluation.encoded, count))
    model = LlavaForConditionalGeneration.from_pretrained(untrained_miniature, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(untrained_miniature)
    with prune(model, rule.spec(count, evaluation.encoded.grid)):
        for row in (0, 3):
            for question, answer in zip(evaluation.pictures[row].questions, answers[row], strict=True):
                content = [{"type": "image"}, {"type": "text", "text": question.text}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                inputs = processor(text=prompt, images=[evaluation.pictures[row].image], return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False)[0]
                new = output[inputs["input_ids"].shape[1] :].tolist()
                end = new.index(evaluation.tokenizer.eos_token_id) if evaluation.tokenizer.eos_token_id in new else None
                assert answer == evaluation.tokenizer.decode(new[:end], skip_special_tokens=True)
    assert len({text for picture in answers for text in picture}) > 5, "a model that always says the same shows nothing"


def test_an_answer_is_right_where_greedy_decoding_gives_it(
    evaluation: Evaluation, untrained_miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = CASES["half"][0](evaluation.encoded, 72)

    def can_be_asked_for(text: str) -> bool:
        ids = evaluation.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (
            len(ids) < MAX_ANSWER
            and evaluation.tokenizer.unk_token_id not in ids
            and evaluation.tokenizer.decode(ids) == text
        )

    pictures = [
        replace(
            picture,
            questions=tuple(
                replace(question, answer=text) if can_be_asked_for(text) else question
                for question, text in zip(picture.questions, texts, strict=True)
            ),
        )
        for picture, texts in zip(evaluation.pictures, evaluation.answers(kept), strict=True)
    ]
    monkeypatch.setattr(module, "draw", dict(zip(HELD_OUT, pictures, strict=False)).__getitem__)
    other = Evaluation.open(untrained_miniature, HELD_OUT[: len(pictures)])
    for case in (kept, random_patches(other.encoded, 40), CASES["varying"][0](other.encoded, 72)):
        is_right = other.is_right(case)
        assert is_right.tolist() == (np.array(other.answers(case), dtype=object) == right_answers(other)).tolist()
    assert 0.1 < other.is_right(kept).mean() < 1


def test_a_picture_gets_in_a_batch_what_it_gets_alone(evaluation: Evaluation, untrained_miniature: Path) -> None:
    alone = Evaluation.open(untrained_miniature, [HELD_OUT[3]])
    assert np.allclose(alone.encoded.received[0], evaluation.encoded.received[3], atol=1e-6)
    kept = random_patches(evaluation.encoded, 36)
    assert alone.answers(kept[3:4])[0] == evaluation.answers(kept)[3]


def test_the_order_of_counts_does_not_mix_pictures_up(evaluation: Evaluation) -> None:
    kept = random_patches(evaluation.encoded, 36)
    ragged = kept.copy()
    ragged[[1, 4], -6:] = -1
    together = evaluation.answers(ragged)
    assert [together[row] for row in (0, 2, 3, 5)] == [evaluation.answers(kept)[row] for row in (0, 2, 3, 5)]
    shorter = evaluation.answers(np.where(kept == kept, kept, -1)[:, :30])
    assert together[1] == shorter[1]


def test_attention_is_what_the_export_is_verified_against(evaluation: Evaluation, untrained_miniature: Path) -> None:
    spec = PruningSpec(first_layer=1, num_layers=3)
    pixels = AutoProcessor.from_pretrained(untrained_miniature).image_processor(
        [picture.image for picture in evaluation.pictures], return_tensors="np"
    )["pixel_values"]
    reference = vision_reference(Checkpoint.open(untrained_miniature), spec, pixels)
    assert reference.importance is not None
    assert np.allclose(evaluation.encoded.received[:, 1:4].mean(axis=1), reference.importance, atol=1e-6)
    assert np.allclose(evaluation.encoded.embeds, reference.embeds, atol=1e-5)


def test_only_layers_that_run_are_seen(evaluation: Evaluation) -> None:
    # The features are those of the last but one layer, so the last of seven has no part in them.
    assert (
        evaluation.encoded.received.shape
        == evaluation.encoded.from_class.shape
        == (len(evaluation.pictures), 6, NUM_PATCHES)
    )
    # All attention but that to the class token.
    assert (evaluation.encoded.received.sum(axis=2) < 1).all()
    assert (evaluation.encoded.received.sum(axis=2) > 0.5).all()


def test_every_kind_is_asked_once_of_every_picture(evaluation: Evaluation) -> None:
    assert evaluation.question_lengths.shape == (len(evaluation.pictures), len(KINDS))
    assert evaluation.encoded.foreground.shape == (len(evaluation.pictures), NUM_PATCHES)
    assert evaluation.encoded.seeds.tolist() == list(HELD_OUT[: len(evaluation.pictures)])
