"""Answers from a server are those of the same decoder in this process."""

from __future__ import annotations

import pytest

from hivtp import Answer, Request, SamplingParams
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp_ops.errors import PromptError
from tests.support.family import picture

FEW = SamplingParams(max_new_tokens=8, temperature=0)


def same(found: Answer, expected: Answer) -> None:
    for name in ("text", "token_ids", "num_prompt_tokens", "num_image_tokens", "num_kept_tokens", "kept_indices"):
        assert getattr(found, name) == getattr(expected, name), name
    assert (found.finish_reason, found.stop) == (expected.finish_reason, expected.stop)


def requests() -> list[Request]:
    pair = [picture(5, (90, 40)), picture(6, (40, 90))]
    talk = [Message("user", [ImagePart(picture(8)), "what is this?"]), Message("assistant", ["a dog"])]
    return [
        Request("what is this?", [picture(1)], FEW),
        Request("<image>\nwhere is the car?", [picture(2)], FEW),
        Request("<image>\n<image>\nhow many houses are there?", pair, FEW),
        Request("what is two and two?", [], FEW),
        Request("and the tree?", [], FEW, "a small system message", talk),
        Request("how many?", [picture(3)], SamplingParams(max_new_tokens=8, temperature=0, ignores_eos=True)),
    ]


def test_each_answer_is_the_one_of_the_local_decoder(exact, remote):
    for request in requests():
        same(remote.generate(request), exact.generate(request))


def test_a_batch_and_requests_in_turn(exact, remote):
    expected = [exact.generate(request) for request in requests()]
    for found in (remote.generate_batch(requests()), list(remote.generate_each(requests()))):
        for answer, other in zip(found, expected, strict=True):
            assert isinstance(answer, Answer), answer
            same(answer, other)


def test_streams_give_their_pieces_as_they_come(exact, remote, fake):
    fake.token_seconds = 0.05
    stream = remote.stream(requests()[0])
    pieces = [next(stream)]
    assert not fake.num_left
    pieces += stream
    assert len(pieces) > 1
    assert "".join(pieces) == exact.generate(requests()[0]).text
    assert stream.answer.timings.prefill_ms > 0
    assert stream.answer.timings.decode_ms_per_token >= 30


def test_a_conversation(exact, remote):
    here, there = exact.chat("a system message"), remote.chat("a system message")
    same(there.ask("what is this?", [picture(9)], FEW), here.ask("what is this?", [picture(9)], FEW))
    same(there.ask("and where?", [], FEW), here.ask("and where?", [], FEW))


def test_log_probabilities(exact, remote):
    sampling = SamplingParams(max_new_tokens=5, temperature=0, logprobs=3)
    found, expected = (
        pipeline.generate("what is this?", [picture(1)], sampling).logprobs for pipeline in (remote, exact)
    )
    assert [item.token_id for item in found] == [item.token_id for item in expected]
    assert [item.top for item in found] == [item.top for item in expected]


def test_a_stop_string_ends_the_answer_on_both_sides(exact, remote, fake):
    sampling = SamplingParams(max_new_tokens=60, temperature=0, ignores_eos=True)
    whole = exact.generate("what is this?", [picture(1)], sampling).text
    stop = whole[len(whole) // 3 : len(whole) // 3 + 4]
    sampling = SamplingParams(max_new_tokens=60, temperature=0, ignores_eos=True, stop=stop)
    fake.token_seconds = 0.02
    same(
        remote.generate("what is this?", [picture(1)], sampling),
        exact.generate("what is this?", [picture(1)], sampling),
    )
    # Stop strings are looked for here, in the text that this tokenizer makes.
    assert "stop" not in fake.chats[0]


def test_settings_reach_the_server(remote, fake):
    sampling = SamplingParams(7, temperature=0.5, top_p=0.9, top_k=11, repetition_penalty=1.2, seed=2**64 - 1)
    remote.generate("what?", [picture(1)], sampling)
    [body] = fake.chats
    sent = {name: body[name] for name in ("max_completion_tokens", "temperature", "top_p", "top_k")}
    assert sent == {"max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 11}
    assert (body["repetition_penalty"], body["seed"], body["model"]) == (1.2, 2**63 - 1, "model")
    assert body["ignore_eos"] is True
    assert body["stop_token_ids"] == [2]
    assert "cache_salt" not in body


def test_images_may_be_sent_in_half_the_bytes(open_remote, fake):
    from tests.support.fake_vllm import _embeds

    open_remote(dtype="float16").generate(requests()[0])
    [image] = _embeds(fake.chats[0]["messages"][0])
    assert image.dtype == "float16"
    assert image.shape == (21, 64)


def test_a_bundle_without_a_decoder_is_enough(exact, open_remote, make_bundle):
    remote = open_remote(make_bundle(preset="192", language_precision="none"))
    same(remote.generate(requests()[0]), exact.generate(requests()[0]))


def test_images_between_words_are_refused_before_anything_is_answered(remote, exact):
    """The server's template puts images first, so it would read another prompt."""
    request = Request("is <image> small?", [picture(1)], FEW)
    assert exact.generate(request).text
    with pytest.raises(PromptError, match="nor images between them can be sent"):
        remote.generate(request)


def test_what_the_server_makes_of_a_prompt_is_compared_token_by_token(remote, fake):
    fake.writes = lambda prompt: [*prompt[:-1], 7]
    with pytest.raises(PromptError, match=r"reads this prompt as (\d+) tokens, and the bundle as \1; they differ from"):
        remote.generate(requests()[0])
    assert fake.num_left <= 1
