"""A live vLLM as the language model of a bundle: answers, and what becomes of them when it is killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.timing.vllm_server import free_port, vllm_server
from hivtp import Answer, LanguageOptions, Pipeline, Request, SamplingParams
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp_ops.errors import BackendUnavailableError, EngineError, HivtpError, PromptError
from tests.support.family import picture
from tests.vllm.conftest import ARGUMENTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.family import Family

pytestmark = pytest.mark.vllm

FEW = SamplingParams(max_new_tokens=8, temperature=0, ignores_eos=True)
# The vision tower is not even loaded there.
LANGUAGE_ALONE = ("--max-model-len", "1024", "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}')


@pytest.fixture(scope="module")
def bundles(llava: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With the decoder, which says what is expected; without it, as a front end has it; with varying counts."""
    folder = tmp_path_factory.mktemp("bundles")
    settings = {
        "whole": ExportSettings(preset="192"),
        "vision": ExportSettings(preset="192", language_precision="none"),
        "paper": ExportSettings(preset="paper"),
    }
    return {
        name: export_bundle(llava.folder, folder / name, setting, is_quiet=True).folder
        for name, setting in settings.items()
    }


def opened(bundle: Path, url: str, **options: Any) -> Pipeline:
    return Pipeline.load(bundle, language=LanguageOptions("vllm", url=url, **options))


def requests() -> list[Request]:
    talk = [Message("user", [ImagePart(picture(8)), "what is this?"]), Message("assistant", ["a dog"])]
    shapes = [(120, 120), (150, 60), (50, 130)]
    return [
        *(Request("what is this?", [picture(seed, size)], FEW) for seed, size in enumerate(shapes)),
        Request("<image>\n<image>\nhow many houses?", [picture(5), picture(6)], FEW),
        Request("what is two and two?", [], FEW),
        Request("and the tree?", [], FEW, None, talk),
        Request("what?", [picture(1)], SamplingParams(max_new_tokens=40, temperature=0)),
        Request("what?", [picture(1)], SamplingParams(max_new_tokens=5, temperature=0, logprobs=3)),
    ]


def check(remote: Pipeline, local: Pipeline) -> None:
    expected = [local.generate(request) for request in requests()]
    alone = [remote.generate(request) for request in requests()]
    for found in (alone, remote.generate_batch(requests())):
        for answer, other in zip(found, expected, strict=True):
            assert isinstance(answer, Answer), answer
            assert answer.token_ids == other.token_ids
            assert (answer.text, answer.finish_reason) == (other.text, other.finish_reason)
            assert answer.num_prompt_tokens == other.num_prompt_tokens
            for one, two in zip(answer.logprobs or (), other.logprobs or (), strict=True):
                assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
                assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in two.top]


def test_a_server_without_the_plugin(bundles, llava, tmp_path):
    with (
        Pipeline.load(bundles["whole"]) as local,
        vllm_server(llava.folder, None, tmp_path / "log", *LANGUAGE_ALONE, "--api-key", "secret") as server,
    ):
        with pytest.raises(EngineError, match="wants another API key"):
            opened(bundles["vision"], server.url)
        with pytest.raises(EngineError, match="more tokens of one image than of another"):
            opened(bundles["paper"], server.url, api_key="secret")
        with opened(bundles["vision"], server.url, api_key="secret") as remote:
            check(remote, local)
            # vLLM would take the letters for the control token.
            with pytest.raises(PromptError, match="neither control tokens such as </s>"):
                remote.generate(Request("what </s> is this?", [picture(1)], FEW))
        assert server.process.poll() is None


def test_with_the_plugin_counts_may_vary_and_a_server_may_be_killed_and_restarted(bundles, llava, tmp_path):
    # Drawn, not greedy: a model this small soon says one token for ever, which may be one that is never shown, and then
    # the first piece comes when the answer is whole. As long as the model allows, since on a busy machine the server
    # sends hundreds of tokens at once.
    port, long = free_port(), SamplingParams(max_new_tokens=1900, temperature=1, seed=0, ignores_eos=True)
    rule, log, arguments = {"preset": "none"}, tmp_path / "log", (*ARGUMENTS, "--max-model-len", "2048")
    with Pipeline.load(bundles["paper"]) as local:
        with vllm_server(llava.folder, rule, log, *arguments, port=port) as server:
            remote = opened(bundles["paper"], server.url)
            check(remote, local)
            stream = remote.stream("what?", [picture(1)], long)
            next(stream)
            server.kill()
            with pytest.raises(HivtpError):
                list(stream)
            with pytest.raises(BackendUnavailableError, match="cannot be reached"):
                remote.generate(requests()[0])
        with vllm_server(llava.folder, rule, log, *arguments, port=port), remote:
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(remote.generate, requests()))
            assert [answer.token_ids for answer in found] == [
                local.generate(request).token_ids for request in requests()
            ]


def test_a_server_without_embeddings_is_refused_when_the_bundle_is_loaded(bundles, llava, tmp_path):
    with (
        vllm_server(llava.folder, None, tmp_path / "log", "--max-model-len", "1024") as server,
        pytest.raises(EngineError, match=r"cannot decode for this bundle: .*start it with .*--enable-mm-embeds"),
    ):
        opened(bundles["vision"], server.url)
