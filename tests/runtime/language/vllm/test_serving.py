"""`hivtp serve` as a front end: vision here, the language model in another server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.fake_vllm import Fault
from tests.support.serving import asking, random_image, serving, wait_for


@pytest.fixture
def server(remote):
    with serving(remote.model, model_names=("hivtp",), num_slots=8) as found:
        yield found


def content(words, seed=1):
    return asking(words, random_image(seed))


def test_answers_are_those_of_the_local_decoder(server, exact, fake):
    with serving(exact.model, model_names=("hivtp",)) as local, ThreadPoolExecutor(8) as threads:
        questions = [content("what is this?", seed) for seed in range(8)]
        expected = [local.answer(question, max_tokens=6) for question in questions]
        assert list(threads.map(lambda question: server.answer(question, max_tokens=6), questions)) == expected
    body = server.chat(questions[0], max_tokens=6).json()
    assert body["usage"]["prompt_tokens_details"]["multimodal_tokens"] == {"image": 21}
    # What one key has asked is not found by another.
    assert len(fake.chats[0]["cache_salt"]) == 64
    server.wait_until_idle()


def test_a_stream_comes_token_by_token(server, fake):
    fake.token_seconds = 0.05
    events = server.stream(content("what is this?"), max_tokens=6, ignore_eos=True)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert sum(bool(event["choices"][0]["delta"].get("content")) for event in events) > 1


@pytest.mark.parametrize("status", [429, 503])
def test_backpressure_is_passed_on(server, fake, status):
    fake.faults = [Fault(status, headers={"Retry-After": "9"})]
    response = server.chat(content("what?"))
    assert (response.status_code, response.headers["retry-after"]) == (status, "9")
    assert response.json()["error"]["code"] == "backend_unavailable"
    assert fake.url not in response.text
    server.wait_until_idle()


def test_an_answer_that_breaks_off_says_so_in_the_stream(server, fake):
    fake.faults = [Fault(cuts_after=2)]
    response = server.chat(content("what?"), stream=True, ignore_eos=True, max_tokens=9)
    assert response.status_code == 200
    assert '"error"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert server.answer(content("what?"), max_tokens=3)


def test_a_client_that_leaves_frees_the_server(server, fake):
    fake.token_seconds = 0.05
    with server.open_stream(content("what?"), max_tokens=200, ignore_eos=True) as response:
        next(response.iter_lines())
    wait_for(lambda: fake.num_left == 1)
    server.wait_until_idle()
