"""hivtp serve as an operator runs it: its options, its keys, and its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hivtp.runtime.cli.serve import OPTIONS, make_parser, settings_from
from hivtp.runtime.serving.settings import ServerSettings
from hivtp_ops.errors import SettingsError
from tests.support.serving import CHAT, body, log_lines

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def parse(*arguments: str) -> argparse.Namespace:
    return make_parser("hivtp serve").parse_args(["bundle", *arguments])


def test_the_defaults_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HIVTP_API_KEY", raising=False)
    assert settings_from(parse()) == ServerSettings()


def test_every_option_is_a_setting():
    names = {field.name for field in fields(ServerSettings)}
    given = [setting for _, _, setting, _, _ in OPTIONS]
    assert len(given) == len(set(given))
    assert set(given) <= names


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("two\n\n three \n")
    monkeypatch.setenv("HIVTP_API_KEY", "four")
    found = settings_from(
        parse(
            *("--host", "0.0.0.0", "--port", "0", "--api-key", "one", "--api-key-file", str(keys)),
            *("--allow-image-domain", "a.example", "--allow-image-domain", "*.b.example", "--slots", "2"),
            *("--chunk-size", "0", "--no-prefix-reuse", "--max-tokens", "100", "--strict", "--log-format", "text"),
            *("--drain-seconds", "1.5"),
        )
    )
    assert found.api_keys == ("one", "four", "two", "three")
    assert found.image_domains == ("a.example", "*.b.example")
    assert (found.num_slots, found.chunk_size, found.max_tokens, found.drain_seconds) == (2, None, 100, 1.5)
    assert not found.reuses_prefix
    assert found.refuses_unknown


def test_a_file_of_keys_must_hold_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HIVTP_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="cannot be read"):
        settings_from(parse("--api-key-file", str(tmp_path / "nothing")))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="holds none"):
        settings_from(parse("--api-key-file", str(tmp_path / "empty")))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hivtp.main", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_cannot_be_served_ends_with_a_message(pruned_bundle: Path, bare_bundle: Path, tmp_path: Path):
    found = run(str(pruned_bundle), "--host", "0.0.0.0")
    assert (found.returncode, found.stdout) == (1, "")
    assert "--api-key, or --insecure" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert run(str(tmp_path)).returncode == 1
    assert "holds no decoder" in run(str(bare_bundle)).stderr
    assert run(str(pruned_bundle), "--slots", "many").returncode == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = run(str(pruned_bundle), "--port", str(taken.getsockname()[1]), "--threads", "1")
        assert found.returncode == 1
        assert "--port" in found.stderr.splitlines()[-1]
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_answers_that_have_begun_end_as_they_would(start: Any, sig: signal.Signals):
    server = start("--drain-seconds", "20")
    thread, parts = server.stream_in_thread(40)
    server.process.send_signal(sig)
    # It is not ready first, and refuses what comes; it lives, and goes on with what it has.
    wait_for_status(server.url + "/ready", 503)
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200
    refused = httpx.post(server.url + CHAT, json=body("what"), trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    thread.join(30)
    text = "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text
    assert "error" not in text
    assert server.process.wait(20) == 0
    events = [line["event"] for line in log_lines(server.log)]
    assert "draining" in events
    assert "drain_deadline" not in events
    assert "Traceback" not in server.log.read_text()


def wait_for_status(url: str, status: int) -> None:
    deadline = time.monotonic() + 5
    while httpx.get(url, trust_env=False).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_at_the_deadline_an_answer_ends_with_an_error(start: Any):
    server = start("--drain-seconds", "0.5")
    thread, parts = server.stream_in_thread(400)
    whole: list[httpx.Response] = []
    waiting = threading.Thread(
        target=lambda: whole.append(
            httpx.post(
                server.url + CHAT, json=body("how", max_tokens=400, ignore_eos=True), timeout=60, trust_env=False
            )
        )
    )
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    server.process.terminate()
    thread.join(30)
    waiting.join(30)
    text = "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "shutting_down")
    assert server.process.wait(20) == 0
    # The twenty seconds that were left of the answer are not waited for.
    assert time.monotonic() - started < 8
    assert "drain_deadline" in [line["event"] for line in log_lines(server.log)]


def test_a_second_signal_ends_it_at_once(start: Any):
    server = start("--drain-seconds", "60")
    thread, parts = server.stream_in_thread(400)
    server.process.terminate()
    wait_for_status(server.url + "/ready", 503)
    server.process.terminate()
    server.process.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert "[DONE]" not in "".join(parts)
