"""What a server that fails costs, and what is tried again."""

from __future__ import annotations

import time

import pytest

from hivtp import LanguageOptions, Pipeline, Request, SamplingParams
from hivtp.runtime.language.vllm import answering
from hivtp_ops.errors import BackendUnavailableError, EngineError, HivtpError, PromptError, SettingsError
from tests.support.fake_vllm import FakeVllm, Fault
from tests.support.family import picture
from tests.support.serving import wait_for

REQUEST = Request("what is this?", [picture(1)], SamplingParams(max_new_tokens=8, temperature=0, ignores_eos=True))


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(answering, "RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("fault", [Fault(drops=True), Fault(status=500), Fault(status=502), Fault(cuts_after=0)])
def test_what_was_not_begun_is_asked_again(remote, exact, fake, fault):
    fake.faults = [fault, fault]
    assert remote.generate(REQUEST).token_ids == exact.generate(REQUEST).token_ids
    assert len(fake.chats) == 3


def test_after_some_tries_it_is_an_error(open_remote, fake):
    remote = open_remote(max_retries=1)
    fake.faults = [Fault(drops=True)] * 3
    with pytest.raises(BackendUnavailableError, match=rf"vLLM server at {fake.url} cannot be reached"):
        remote.generate(REQUEST)
    assert len(fake.chats) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(cuts_after=3), "cannot be reached|ended the connection before the answer was whole"),
        (Fault(fails_after=3, status=500, message="engine died"), "engine died"),
        (Fault(ends_after=3), "ended the answer early, for the reason 'stop'"),
    ],
)
def test_what_was_begun_is_never_asked_again(remote, fake, fault, words):
    fake.faults = [fault]
    stream = remote.stream(REQUEST)
    next(stream)
    with pytest.raises(EngineError, match=words):
        list(stream)
    assert len(fake.chats) == 1


@pytest.mark.parametrize(("status", "header", "seconds"), [(429, "7", 7), (503, "1.5", 1.5), (503, "soon", None)])
def test_a_busy_server_is_not_pressed(remote, fake, status, header, seconds):
    fake.faults = [Fault(status, headers={"Retry-After": header})]
    with pytest.raises(BackendUnavailableError, match="is busy: no") as caught:
        remote.generate(REQUEST)
    assert (caught.value.status, caught.value.retry_after) == (status, seconds)
    assert len(fake.chats) == 1


def test_what_the_server_refuses_is_the_requests_fault(remote, fake):
    fake.faults = [Fault(422, "too long")]
    with pytest.raises(PromptError, match="refuses the request: too long"):
        remote.generate(REQUEST)


def test_a_silent_server_is_given_up(open_remote, fake):
    remote = open_remote(max_silence=0.3, max_retries=0)
    fake.faults = [Fault(is_silent=True)]
    with pytest.raises(BackendUnavailableError, match=r"silent for 0\.3 seconds"):
        remote.generate(REQUEST)
    wait_for(lambda: fake.num_left == 1)


def test_a_request_that_is_given_up_leaves_the_server(remote, fake):
    fake.token_seconds = 0.02
    stream = remote.stream(Request("what?", [picture(1)], SamplingParams(max_new_tokens=200, ignores_eos=True)))
    next(stream)
    stream.close()
    wait_for(lambda: fake.num_left == 1)


@pytest.mark.parametrize(
    "line",
    [
        b"data: {",
        b"data: []",
        b'data: {"choices": [{"token_ids": ["x"]}]}',
        b'data: {"choices": 5}',
        b'data: {"prompt_token_ids": [true]}',
        b'data: {"choices": [{"token_ids": [1], "logprobs": {"content": [{"token": "a", "logprob": 0}]}}]}',
        b"data: " + b"x" * 2**22,
    ],
)
def test_a_server_that_talks_nonsense_is_an_error(remote, fake, line):
    fake.faults = [Fault(line=line)]
    with pytest.raises(EngineError, match=r"streams something that vLLM 0\.32 and 0\.33 do not|as no vLLM does"):
        remote.generate(REQUEST)


def test_one_request_of_a_batch_fails_alone(remote, exact, fake):
    fake.faults = [Fault(422)]
    results = remote.generate_batch([REQUEST] * 4)
    errors = [result for result in results if isinstance(result, HivtpError)]
    assert len(errors) == 1
    expected = exact.generate(REQUEST).token_ids
    assert all(isinstance(result, HivtpError) or result.token_ids == expected for result in results)


def test_a_server_that_comes_back_is_asked_again(open_remote, exact, fake):
    remote = open_remote(max_retries=0)
    port = fake.port
    fake.close()
    with pytest.raises(BackendUnavailableError, match="cannot be reached"):
        remote.generate(REQUEST)
    restarted = FakeVllm(exact.model, port)
    try:
        assert remote.generate(REQUEST).token_ids == exact.generate(REQUEST).token_ids
    finally:
        restarted.close()


def test_a_closed_pipeline_asks_nothing_more(remote, fake):
    remote.close()
    with pytest.raises(EngineError, match="pipeline is closed"):
        remote.generate(REQUEST)
    assert not fake.chats


def opening(bundle, **options):
    return Pipeline.load(bundle, language=LanguageOptions("vllm", **options))


def test_what_the_server_lacks_is_said_when_the_bundle_is_loaded(exact_bundle, pruned_bundle, fake):
    with pytest.raises(EngineError, match="has the models model, not 'other'; set model_name"):
        opening(exact_bundle, url=fake.url, model_name="other")
    # Images of several lengths would end vLLM's own LLaVA.
    with pytest.raises(EngineError, match=r"more tokens of one image than of another.*hivtp's plugin"):
        opening(pruned_bundle, url=fake.url)
    assert not fake.chats
    fake.has_plugin = True
    opening(pruned_bundle, url=f"{fake.url}/v1").close()

    fake.faults = [Fault(400, "You must set `--enable-mm-embeds`")] * 2
    with pytest.raises(EngineError, match=r"cannot decode for this bundle: .*enable-mm-embeds.*; start it with"):
        opening(exact_bundle, url=fake.url)
    fake.writes = lambda prompt: [1, *prompt]
    with pytest.raises(EngineError, match="tokenizer and the chat template of the bundle's checkpoint"):
        opening(exact_bundle, url=fake.url)
    fake.key = "secret"
    with pytest.raises(EngineError, match="wants another API key: Unauthorized; set api_key"):
        opening(exact_bundle, url=fake.url)
    fake.writes = list
    opening(exact_bundle, url=fake.url, api_key="secret").close()


def test_a_template_that_writes_the_bos_token_itself(exact_bundle, fake):
    """The server is told whether its tokenizer adds one, as that comes to the prompt of the bundle."""
    fake.writes = lambda prompt: prompt if not fake.chats[-1]["add_special_tokens"] else [1, *prompt]
    with opening(exact_bundle, url=fake.url) as pipeline:
        pipeline.generate(REQUEST)
    assert [chat["add_special_tokens"] for chat in fake.chats] == [True, False, False]


def test_nobody_there(exact_bundle):
    started = time.monotonic()
    with pytest.raises(BackendUnavailableError, match="cannot be reached"):
        opening(exact_bundle, url="http://127.0.0.1:9")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a url"),
        ({"url": "host:8000"}, "needs a url"),
        ({"url": "http://"}, "must be scheme, host and port"),
        ({"url": "http://user:word@host"}, "a key goes into api_key"),
        ({"url": "http://host:port"}, "cannot be read"),
        ({"url": "http://host", "dtype": "bfloat16"}, "float32 or float16"),
        ({"url": "http://host", "api_key": "a\nb"}, "api_key must be printable"),
        ({"url": "http://host", "max_silence": 0}, "max_silence must be seconds"),
        ({"url": "http://host", "max_retries": -1}, "max_retries must be a whole number"),
        ({"url": "http://host", "device": "cuda"}, "device 'cuda' belongs to the language backend onnxruntime or"),
    ],
)
def test_options_that_cannot_work(exact_bundle, options, words):
    with pytest.raises(SettingsError, match=words):
        opening(exact_bundle, **options)


def test_the_key_is_not_shown():
    assert "secret" not in repr(LanguageOptions("vllm", url="http://host", api_key="secret"))
    with pytest.raises(SettingsError, match="api_key belongs to the language backend vllm") as caught:
        LanguageOptions(api_key="secret")
    assert "secret" not in str(caught.value)
