from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from benchmarks.checkpoints import CHAT_TEMPLATE
from hivtp import Chat, ImagePart, Message, Request
from hivtp.runtime.generation import Generation
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.language.kv_cache import BoundSlots, KvCache
from hivtp_ops.errors import EngineError, ImageError, OutOfMemoryError, PromptError
from tests.support.answers import at_most, load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hivtp import Pipeline
    from tests.support.reference import HuggingFace

NUM_TOKENS = 8
FIRST = "What is in the picture?"
# (prompt, photos): text alone, one picture, a picture in a later turn, several with marks.
CONVERSATIONS = [
    [(FIRST, ["astronaut.png"]), ("how many dogs", []), ("and what colour", [])],
    [("how many", []), (FIRST, ["chelsea.png"]), ("and left of it", [])],
    [("Is <image> as red as <image>", ["coffee.png", "chelsea.png"]), ("or <image>", ["rocket.jpg"]), ("why", [])],
    [("Ünïcödé 猫?", ["camera.png"]), ("the same", ["camera.png"])],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAVA = PromptTemplate(None, TOKENS)


@pytest.fixture
def num_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each run of the decoder computed."""
    counts: list[int] = []
    run = BoundSlots.run
    monkeypatch.setattr(
        BoundSlots,
        "run",
        lambda self, embeds, lengths: counts.append(embeds.shape[1]) or run(self, embeds, lengths),
    )
    return counts


def fresh_request(history: Sequence[Message], prompt: str, files: Sequence[Path], **sampling: Any) -> Request:
    """The whole conversation as one request that knows nothing of a chat; `files` are the images of all turns."""
    remaining = iter(files)
    earlier = [
        Message(
            message.role,
            [ImagePart(next(remaining)) if isinstance(part, ImagePart) else part for part in message.parts],
            message.keeps_places,
        )
        for message in history
    ]
    return Request(prompt, list(remaining), at_most(NUM_TOKENS, **sampling), history=earlier)


def fresh_tokens(pipeline: Pipeline, chat: Chat, prompt: str, files: Sequence[Path], **sampling: Any) -> list[int]:
    return pipeline.generate(fresh_request(chat.history, prompt, files, **sampling)).token_ids


def write(pipeline: Pipeline, text: str, monkeypatch: pytest.MonkeyPatch, ids: Sequence[int] | None = None) -> None:
    """Make the model say this, whatever it is asked."""
    ids = pipeline.model.tokenizer.encode(text, add_special_tokens=False) if ids is None else ids
    said = iter([*ids, 2])
    monkeypatch.setattr(Generation, "choose", lambda _self, _logits: next(said))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("bundle", ["unpruned", "varying"])
def test_each_answer_is_the_one_to_the_whole_conversation(pipelines, photos, bundle, conversation) -> None:
    pipeline = pipelines[bundle]
    chat, files = pipeline.chat(), []
    for number, (prompt, names) in enumerate(conversation, 1):
        files += [photos / name for name in names]
        expected = fresh_tokens(pipeline, chat, prompt, files)
        answer = chat.ask(prompt, [photos / name for name in names], at_most(NUM_TOKENS))
        assert answer.token_ids == expected
        assert answer.num_image_tokens == 64 * len(names)
        question, said = chat.history[-2:]
        assert (question.role, question.text) == ("user", prompt.replace("<image>", ""))
        assert len(question.images) == len(names)
        assert said == Message("assistant", [answer.text])
        assert len(chat.history) == 2 * number


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
            outputs = hugging_face.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answer = chat.ask(prompt, [photos / name for name in names], at_most(NUM_TOKENS))
        assert answer.token_ids == outputs[0, inputs["input_ids"].shape[1] :].tolist()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})


def test_sampled_answers_follow_the_seed(pruned, photo) -> None:
    chat = pruned.chat()
    chat.ask(FIRST, [photo], at_most(NUM_TOKENS))
    expected = fresh_tokens(pruned, chat, "how many", [photo], temperature=1.0, seed=4)
    assert chat.ask("how many", (), at_most(NUM_TOKENS, temperature=1.0, seed=4)).token_ids == expected


def test_a_further_question_computes_only_what_is_new(unpruned, photo, num_positions) -> None:
    chat = unpruned.chat()
    whole = chat.ask(FIRST, [photo], at_most(1)).num_prompt_tokens
    assert num_positions == [whole]
    num_positions.clear()
    # The first answer's token was never computed; the rest of the turn is new.
    answer = chat.ask("how many dogs", (), at_most(1))
    assert num_positions == [answer.num_prompt_tokens - whole]
    assert num_positions[0] < 40
    num_positions.clear()
    other = unpruned.chat()
    assert num_positions == [] == [*other.history]
    assert [other.ask("how many dogs", (), at_most(1)).num_prompt_tokens] == num_positions


def test_an_answer_that_tokenises_to_itself_is_not_computed_again(unpruned_bundle, num_positions, monkeypatch) -> None:
    pipeline = load(unpruned_bundle)
    pipeline.model.template = LLAVA
    chat = pipeline.chat()
    with monkeypatch.context() as patch:
        write(pipeline, "a red dog", patch)
        first = chat.ask("what is it")
    assert (first.text, first.finish_reason) == ("a red dog", "stop")
    num_positions.clear()
    chat.ask("how many", (), at_most(1))
    # What is left: the end-of-sequence token, which was never computed, and the new turn.
    new = pipeline.model.tokenizer.encode("</s>USER: how many ASSISTANT:", add_special_tokens=False)
    assert num_positions == [len(new)]


def test_pictures_of_earlier_turns_cost_no_vision_run(pruned_bundle, pruned, photo, monkeypatch) -> None:
    pipeline = load(pruned_bundle, cache_bytes=0)
    chat = pipeline.chat()
    chat.ask(FIRST, [photo], at_most(3))
    monkeypatch.setattr(pipeline.model.images._encoder._vision, "engine", None)
    expected = fresh_tokens(pruned, chat, "how many", [photo])
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected


def test_the_cache_grows_with_the_conversation_and_keeps_what_it_holds(unpruned, num_positions) -> None:
    chat = unpruned.chat()
    for number in range(9):
        prompt = "a " * (1 + 7 * (number % 3))
        expected = fresh_tokens(unpruned, chat, prompt, [])
        num_positions.clear()
        assert chat.ask(prompt, (), at_most(NUM_TOKENS)).token_ids == expected
        assert num_positions[0] < 60
    slots = chat._scheduler._slots
    assert slots.capacity >= slots.length(0) > 200


def test_turns_are_independent_of_other_chats(unpruned, photos) -> None:
    chats = [unpruned.chat() for _ in range(3)]
    names = ("astronaut.png", "chelsea.png", "coffee.png")
    for chat, name in zip(chats, names, strict=True):
        chat.ask("what is it", [photos / name], at_most(NUM_TOKENS))
    for chat, name in zip(chats, names, strict=True):
        expected = fresh_tokens(unpruned, chat, "how many", [photos / name])
        assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected


def test_a_stream_gives_the_pieces_of_the_answer_that_ask_gives(unpruned, photo) -> None:
    chats = [unpruned.chat(), unpruned.chat()]
    for prompt, images in (("what is it", [photo]), ("how many", [])):
        stream = chats[0].stream(prompt, images, at_most(NUM_TOKENS))
        pieces = list(stream)
        answer = chats[1].ask(prompt, images, at_most(NUM_TOKENS))
        assert "".join(pieces) == stream.answer.text == answer.text
        assert stream.answer.token_ids == answer.token_ids
    assert chats[0].history == chats[1].history


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_an_abandoned_turn_leaves_the_chat_without_it(unpruned, photos, num_pieces) -> None:
    file = photos / "astronaut.png"
    chat = unpruned.chat()
    chat.ask(FIRST, [file], at_most(NUM_TOKENS))
    stream = chat.stream("or rather", [photos / "chelsea.png"], at_most(40))
    for _ in range(num_pieces):
        next(stream)
    assert len(chat.history) == 2
    expected = fresh_tokens(unpruned, chat, "how many", [file])
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected
    with pytest.raises(RuntimeError, match="a newer turn of this chat has begun"):
        list(stream)
    assert [message.text for message in chat.history[::2]] == [FIRST, "how many"]
    del stream
    expected = fresh_tokens(unpruned, chat, "why", [file])
    assert chat.ask("why", (), at_most(NUM_TOKENS)).token_ids == expected


def test_a_turn_that_begins_too_late_leaves_no_trace_even_where_it_has_no_text(unpruned, monkeypatch) -> None:
    chat = unpruned.chat()
    stream = chat.stream("or rather", (), at_most(4))
    chat.ask("how many", (), at_most(4))
    write(unpruned, "", monkeypatch)
    with pytest.raises(RuntimeError, match="a newer turn of this chat has begun"):
        list(stream)
    assert [message.text for message in chat.history[::2]] == ["how many"]


@pytest.mark.parametrize("failing_run", [0, 1, 4])
def test_a_turn_that_fails_leaves_the_chat_without_it(unpruned, photos, monkeypatch, failing_run) -> None:
    file = photos / "astronaut.png"
    chat = unpruned.chat()
    chat.ask(FIRST, [file], at_most(NUM_TOKENS))
    expected = fresh_tokens(unpruned, chat, "how many", [file])
    run, runs = BoundSlots.run, []

    def fail(self: Any, embeds: Any, lengths: Any) -> Any:
        runs.append(lengths)
        if len(runs) > failing_run:
            raise EngineError("broken")
        return run(self, embeds, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(BoundSlots, "run", fail)
        with pytest.raises(EngineError, match="broken"):
            chat.ask("or rather", [photos / "chelsea.png"], at_most(NUM_TOKENS))
    assert len(chat.history) == 2
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected


def test_without_memory_to_grow_the_chat_stays_as_it_was(unpruned, photo, monkeypatch, num_positions) -> None:
    chat = unpruned.chat()
    chat.ask(FIRST, [photo], at_most(NUM_TOKENS))
    expected = fresh_tokens(unpruned, chat, "how many", [photo])

    def no_room(_self: KvCache) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(KvCache, "_allocate", no_room)
        with pytest.raises(OutOfMemoryError):
            chat.ask("a " * 200)
    num_positions.clear()
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected
    assert num_positions[0] < 40


def test_bad_turns_are_refused_and_leave_the_chat_as_it_was(unpruned, photo, tmp_path) -> None:
    chat = unpruned.chat()
    chat.ask(FIRST, [photo], at_most(NUM_TOKENS))
    expected = fresh_tokens(unpruned, chat, "how many", [photo])
    with pytest.raises(PromptError, match="the prompt is empty"):
        chat.ask("")
    with pytest.raises(ImageError, match="there is no image file"):
        chat.ask("what", [tmp_path / "absent.png"])
    with pytest.raises(PromptError, match="has 1 <image> marks and 0 images"):
        chat.ask("what <image>")
    with pytest.raises(PromptError, match=r"images and earlier turns included.*start a new chat"):
        chat.ask("a " * 500)
    with pytest.raises(PromptError, match=r"images and earlier turns included.*start a new chat"):
        chat.ask("what " + "<image>" * 7, [photo] * 7, at_most(1))
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected


def test_a_conversation_ends_where_the_context_does(unpruned) -> None:
    chat = unpruned.chat()
    for _ in range(5):
        chat.ask("a " * 40, (), at_most(5))
    with pytest.raises(PromptError, match="start a new chat"):
        chat.ask("a " * 400)
    assert len(chat.history) == 10


def test_an_image_token_that_the_model_spells_out_stands_for_no_image(unpruned, monkeypatch) -> None:
    chat, backend = unpruned.chat(), unpruned.model.tokenizer._backend
    with monkeypatch.context() as patch:
        write(unpruned, "", patch, [backend.token_to_id(character) for character in "a<image>b"])
        assert chat.ask("what is it").text == "a<image>b"
    assert chat.history[1] == Message("assistant", ["a<image>b"])
    expected = fresh_tokens(unpruned, chat, "how many", [])
    assert chat.ask("how many", (), at_most(NUM_TOKENS)).token_ids == expected


def test_a_system_prompt_stands_before_every_turn(unpruned) -> None:
    chat = unpruned.chat("the road is red")
    for prompt in ("what is it", "how many"):
        history = [Message("system", ["the road is red"]), *chat.history]
        expected = unpruned.generate(Request(prompt, (), at_most(NUM_TOKENS), history=history)).token_ids
        assert chat.ask(prompt, (), at_most(NUM_TOKENS)).token_ids == expected
        without = Request(prompt, (), at_most(NUM_TOKENS), history=chat.history[:-2])
        assert expected != unpruned.generate(without).token_ids


def test_turns_render_in_the_form_of_llava(unpruned) -> None:
    tokenizer = unpruned.model.tokenizer
    image = ImagePart(b"")
    messages = [
        Message("user", [image, "What is it?"]),
        Message("assistant", ["A cat."]),
        Message("user", ["Why ", image, "?"], keeps_places=True),
        Message("assistant", ["So."]),
        Message("user", ["Oh"]),
    ]
    expected = (
        "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Why <image>? ASSISTANT: So.</s>USER: Oh ASSISTANT:"
    )
    assert LLAVA.render(messages, tokenizer) == expected
    assert PromptTemplate(None).render(messages, tokenizer) == expected.replace("</s>", "")
    templated = PromptTemplate(CHAT_TEMPLATE, TOKENS).render(messages, tokenizer)
    assert templated.split() == expected.replace("</s>", " ").split()


def test_a_template_that_loses_a_turn_is_refused(unpruned) -> None:
    last_only = (
        "{% for part in messages[-1]['content'] %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    )
    template, tokenizer = PromptTemplate(last_only), unpruned.model.tokenizer
    question = Message("user", [ImagePart(b""), "what"])
    assert template.render([question], tokenizer) == "<image>what"
    earlier = [Message("user", ["before"]), Message("assistant", ["yes"])]
    with pytest.raises(PromptError, match="loses words or an image"):
        template.render([*earlier, question], tokenizer)


def test_a_pipeline_makes_chats(unpruned) -> None:
    assert isinstance(unpruned.chat(), Chat)
    assert unpruned.chat().history == ()
