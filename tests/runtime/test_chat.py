from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from benchmarks.checkpoints import CHAT_TEMPLATE
from hivtp import Chat, Pipeline
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.prompt import PromptTemplate, Turn
from hivtp.runtime.language import kv_cache, onnxruntime
from hivtp.runtime.language.sampling import Sampler, SamplingSettings
from hivtp_ops.errors import EngineError, ImageError, PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.reference import HuggingFace

NUM_TOKENS = 8
# (prompt, photos): text alone, one picture, a picture in a later turn, several with marks.
CONVERSATIONS = [
    [("What is in the picture?", ["astronaut.png"]), ("how many dogs", []), ("and what colour", [])],
    [("how many", []), ("What is in the picture?", ["chelsea.png"]), ("and left of it", [])],
    [("Is <image> as red as <image>", ["coffee.png", "chelsea.png"]), ("or <image>", ["rocket.jpg"]), ("why", [])],
    [("Ünïcödé 猫?", ["camera.png"]), ("the same", ["camera.png"])],
]
LLAVA = PromptTemplate(None, "<s>", "</s>")


@pytest.fixture
def num_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each run of the decoder computed."""
    counts: list[int] = []

    class Counted(kv_cache.BoundRows):
        def run(self, embeds: Any, lengths: Any) -> Any:
            counts.append(embeds.shape[1])
            return super().run(embeds, lengths)

    monkeypatch.setattr(onnxruntime, "BoundRows", Counted)
    return counts


def fresh_tokens(pipeline: Pipeline, history: Sequence[Turn], prompt: str, files: list[Path], **sampling: Any) -> Any:
    """What the decoder says to the whole conversation, with nothing kept; `files` are the images of all turns."""
    num_images = len(files) - sum(turn.num_images for turn in history)
    prepared = pipeline.prepare(prompt, files[len(files) - num_images :], history)
    encoded = pipeline.images.encode([pipeline.images.prepare(load_image(file)) for file in files])
    embeds = pipeline.embed(prepared, encoded)
    return list(pipeline.language.generate(embeds, NUM_TOKENS, Sampler(SamplingSettings(**sampling))))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("bundle", ["unpruned", "varying"])
def test_each_answer_is_the_one_to_the_whole_conversation(pipelines, photos, bundle, conversation) -> None:
    pipeline = pipelines[bundle]
    chat, files = pipeline.chat(), []
    for prompt, names in conversation:
        files += [photos / name for name in names]
        expected = fresh_tokens(pipeline, chat.turns, prompt, files)
        answer = chat.ask(prompt, [photos / name for name in names], max_new_tokens=NUM_TOKENS)
        assert answer.token_ids == expected
        assert answer.num_image_tokens == 64 * len(names)
        assert chat.turns[-1] == Turn(prompt, len(names), answer.text)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_answers_equal_transformers(unpruned, hugging_face: HuggingFace, photos, conversation) -> None:
    chat, messages, images = unpruned.chat(), [], []
    for prompt, names in conversation:
        is_marked = "<image>" in prompt
        parts = [] if is_marked else [{"type": "image"} for _ in names]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": prompt}]})
        images += [Image.open(photos / name).convert("RGB") for name in names]
        text = hugging_face.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = hugging_face.processor(text=text, images=images or None, return_tensors="pt")
        with torch.inference_mode():
            tokens = hugging_face.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answer = chat.ask(prompt, [photos / name for name in names], max_new_tokens=NUM_TOKENS)
        assert answer.token_ids == tokens[0, inputs["input_ids"].shape[1] :].tolist()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})


def test_sampled_answers_follow_the_seed(pruned, photo) -> None:
    chat = pruned.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=NUM_TOKENS)
    expected = fresh_tokens(pruned, chat.turns, "how many", [photo], temperature=1.0, seed=4)
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS, temperature=1.0, seed=4).token_ids == expected


def test_a_further_question_computes_only_what_is_new(unpruned, photo, num_positions) -> None:
    chat = unpruned.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=1)
    whole = len(unpruned.prepare("What is in the picture?", [photo]).token_ids) + 63
    assert num_positions == [whole]
    num_positions.clear()
    chat.ask("how many dogs", max_new_tokens=1)
    # The first answer's token was never computed; the rest of the turn is new.
    all_ids = unpruned.prepare("how many dogs", (), chat.turns[:1]).token_ids
    assert num_positions == [len(all_ids) + 63 - whole]
    assert num_positions[0] < 40
    num_positions.clear()
    other = unpruned.chat()
    other.ask("how many dogs", max_new_tokens=1)
    assert len(num_positions) == 1


def test_an_answer_that_tokenises_to_itself_is_not_computed_again(unpruned, num_positions) -> None:
    chat = unpruned.chat()
    choices = iter([*unpruned.tokenizer.encode("a red dog", add_special_tokens=False), 2])
    generate = unpruned.language.generate
    pipeline = Pipeline.load(unpruned.bundle.folder, num_threads=1)
    pipeline.template = LLAVA
    pipeline.language.generate = lambda embeds, num, _sampler, cache: generate(
        embeds, num, lambda _logits: next(choices), cache
    )
    chat = pipeline.chat()
    first = chat.ask("what is it")
    assert (first.text, first.finish_reason) == ("a red dog", "stop")
    num_positions.clear()
    del pipeline.language.generate
    chat.ask("how many", max_new_tokens=1)
    # What is left: the end-of-sequence token, which was never computed, and the new turn.
    new = pipeline.tokenizer.encode("</s>USER: how many ASSISTANT:", add_special_tokens=False)
    assert num_positions == [len(new)]


def test_pictures_of_earlier_turns_cost_no_vision_run(pruned, photo, monkeypatch) -> None:
    pipeline = Pipeline.load(pruned.bundle.folder, num_threads=1, image_cache_bytes=0)
    chat = pipeline.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=3)
    monkeypatch.setattr(pipeline.images._encoder._vision, "engine", None)
    expected = fresh_tokens(pruned, chat.turns, "how many", [photo])
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected


def test_the_cache_grows_with_the_conversation_and_keeps_what_it_holds(unpruned, num_positions) -> None:
    chat = unpruned.chat()
    for number in range(9):
        prompt = "a " * (1 + 7 * (number % 3))
        expected = fresh_tokens(unpruned, chat.turns, prompt, [])
        num_positions.clear()
        assert chat.ask(prompt, max_new_tokens=NUM_TOKENS).token_ids == expected
        assert num_positions[0] < 60
    assert chat._cache.length > 200


def test_turns_are_independent_of_other_chats(unpruned, photos) -> None:
    chats = [unpruned.chat() for _ in range(3)]
    names = ("astronaut.png", "chelsea.png", "coffee.png")
    for chat, name in zip(chats, names, strict=True):
        chat.ask("what is it", [photos / name], max_new_tokens=NUM_TOKENS)
    for chat, name in zip(chats, names, strict=True):
        expected = fresh_tokens(unpruned, chat.turns, "how many", [photos / name])
        assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected


def test_a_stream_gives_the_pieces_of_the_answer_that_ask_gives(unpruned, photo) -> None:
    chats = [unpruned.chat(), unpruned.chat()]
    for prompt, images in (("what is it", [photo]), ("how many", [])):
        stream = chats[0].stream(prompt, images, max_new_tokens=NUM_TOKENS)
        pieces = list(stream)
        answer = chats[1].ask(prompt, images, max_new_tokens=NUM_TOKENS)
        assert "".join(pieces) == stream.answer.text == answer.text
        assert stream.answer.token_ids == answer.token_ids
    assert chats[0].turns == chats[1].turns


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_an_abandoned_turn_leaves_the_chat_without_it(unpruned, photos, num_pieces) -> None:
    file = photos / "astronaut.png"
    chat = unpruned.chat()
    chat.ask("What is in the picture?", [file], max_new_tokens=NUM_TOKENS)
    stream = chat.stream("or rather", [photos / "chelsea.png"], max_new_tokens=40)
    for _ in range(num_pieces):
        next(stream)
    assert len(chat.turns) == 1
    expected = fresh_tokens(unpruned, chat.turns, "how many", [file])
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected
    assert [turn.prompt for turn in chat.turns] == ["What is in the picture?", "how many"]
    with pytest.raises(RuntimeError, match="a newer turn of this chat has begun"):
        list(stream)
    del stream
    gc.collect()
    expected = fresh_tokens(unpruned, chat.turns, "why", [file])
    assert chat.ask("why", max_new_tokens=NUM_TOKENS).token_ids == expected


@pytest.mark.parametrize("failing_run", [0, 1, 4])
def test_a_turn_that_fails_leaves_the_chat_without_it(unpruned, photos, monkeypatch, failing_run) -> None:
    file = photos / "astronaut.png"
    chat = unpruned.chat()
    chat.ask("What is in the picture?", [file], max_new_tokens=NUM_TOKENS)
    expected = fresh_tokens(unpruned, chat.turns, "how many", [file])
    run, runs = kv_cache.BoundRows.run, []

    def fail(self: Any, embeds: Any, lengths: Any) -> Any:
        runs.append(lengths)
        if len(runs) > failing_run:
            raise EngineError("broken")
        return run(self, embeds, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(kv_cache.BoundRows, "run", fail)
        with pytest.raises(EngineError, match="broken"):
            chat.ask("or rather", [photos / "chelsea.png"], max_new_tokens=NUM_TOKENS)
    assert len(chat.turns) == 1
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected


def test_without_memory_to_grow_the_chat_stays_as_it_was(unpruned, photo, monkeypatch) -> None:
    chat = unpruned.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=NUM_TOKENS)
    expected = fresh_tokens(unpruned, chat.turns, "how many", [photo])

    def allocate(*_sizes: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "allocate_cache", allocate)
        with pytest.raises(MemoryError):
            chat.ask("a " * 200)
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected


def test_bad_turns_are_refused_and_leave_the_chat_as_it_was(unpruned, photo, tmp_path) -> None:
    chat = unpruned.chat()
    chat.ask("What is in the picture?", [photo], max_new_tokens=NUM_TOKENS)
    expected = fresh_tokens(unpruned, chat.turns, "how many", [photo])
    with pytest.raises(PromptError, match="the prompt is empty"):
        chat.ask("")
    with pytest.raises(ImageError, match="there is no image file"):
        chat.ask("what", [tmp_path / "absent.png"])
    with pytest.raises(PromptError, match="has 1 <image> marks and 0 images"):
        chat.ask("what <image>")
    with pytest.raises(PromptError, match=r"images and earlier turns included.*start a new chat"):
        chat.ask("a " * 500)
    with pytest.raises(PromptError, match=r"images and earlier turns included.*start a new chat"):
        chat.ask("what " + "<image>" * 7, [photo] * 7, max_new_tokens=1)
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == expected


def test_a_conversation_ends_where_the_context_does(unpruned) -> None:
    chat = unpruned.chat()
    for _ in range(5):
        chat.ask("a " * 40, max_new_tokens=5)
    with pytest.raises(PromptError, match="start a new chat"):
        chat.ask("a " * 400)
    assert len(chat.turns) == 5
    with pytest.raises(PromptError, match="shorten the prompt"):
        unpruned.chat().ask("a " * 600)


def test_an_image_token_that_the_model_spells_out_stands_for_no_image(unpruned) -> None:
    pipeline = Pipeline.load(unpruned.bundle.folder, num_threads=1)
    spelled = iter([*(pipeline.tokenizer._backend.token_to_id(character) for character in "a<image>b"), 2])
    generate = pipeline.language.generate
    pipeline.language.generate = lambda embeds, num, _sampler, cache: generate(
        embeds, num, lambda _logits: next(spelled), cache
    )
    chat = pipeline.chat()
    assert chat.ask("what is it").text == "a<image>b"
    assert chat.turns[0].answer == "ab"
    del pipeline.language.generate
    assert chat.ask("how many", max_new_tokens=NUM_TOKENS).token_ids == fresh_tokens(
        unpruned, chat.turns[:1], "how many", []
    )


def test_turns_render_in_the_form_of_llava() -> None:
    history = [Turn("What is it?", 1, "A cat."), Turn("Why <image>?", 1, "So.")]
    expected = (
        "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Why <image>? ASSISTANT: So.</s>USER: Oh ASSISTANT:"
    )
    assert LLAVA.render("Oh", 0, history) == expected
    assert replace(LLAVA, eos_token=None).render("Oh", 0, history) == expected.replace("</s>", "")
    templated = PromptTemplate(CHAT_TEMPLATE, "<s>", "</s>").render("Oh", 0, history)
    assert templated.split() == expected.replace("</s>", " ").split()


def test_a_template_that_loses_a_turn_is_refused() -> None:
    last_only = (
        "{% for part in messages[-1]['content'] %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    )
    template = PromptTemplate(last_only, None, None)
    assert template.render("what", 1) == "<image>what"
    with pytest.raises(PromptError, match="loses the prompt or an image"):
        template.render("what", 0, [Turn("before", 0, "yes")])


def test_a_pipeline_makes_chats(unpruned) -> None:
    assert isinstance(unpruned.chat(), Chat)
    assert unpruned.chat().turns == ()
