"""The command line, whose language model is a server that wants a key."""

from __future__ import annotations

from hivtp import SamplingParams
from tests.support.command import hivtp_run


def test_the_key_comes_from_the_environment(exact_bundle, exact, fake, photo):
    fake.key = "secret"
    arguments = (exact_bundle, "what is this?", "--image", photo, "--max-new-tokens", 6)
    remote = ("--language-backend", "vllm", "--language-url", fake.url)
    done = hivtp_run(*arguments, *remote, HIVTP_LANGUAGE_API_KEY="secret")
    assert done.returncode == 0, done.stderr
    sampling = SamplingParams(max_new_tokens=6)
    assert done.stdout.split("\n\n")[0] == exact.generate("what is this?", [photo], sampling).text
    assert len(fake.chats) == 2
    refused = hivtp_run(*arguments, *remote, HIVTP_LANGUAGE_API_KEY="other")
    assert refused.returncode == 1
    assert "wants another API key" in refused.stderr
    assert "other" not in refused.stderr.replace("another", "")
