"""The load on a server: what is asked, what a client notes, and what is made of it."""

from __future__ import annotations

import asyncio
import json
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import pytest

from benchmarks import serve
from benchmarks.report.serving import serving_parts
from benchmarks.serving.client import Exchange, ask
from benchmarks.serving.figures import Figures, Goals, bucket_quantile
from benchmarks.serving.load import Run
from benchmarks.serving.process import read_metrics
from benchmarks.serving.traffic import Traffic, arrivals, body

if TYPE_CHECKING:
    from pathlib import Path


def test_the_same_seed_asks_the_same():
    first, again, other = (Traffic(seed) for seed in (1, 1, 2))
    requests = [first.request() for _ in range(60)]
    assert requests == [again.request() for _ in range(60)]
    assert requests != [other.request() for _ in range(60)]
    contents = [json.loads(request)["messages"][0]["content"] for request in requests]
    images = [content[1]["image_url"]["url"] for content in contents if isinstance(content, list)]
    assert 10 < len(images) < 55
    # Some come twice.
    assert 10 < len(set(images)) < len(images)


def test_requests_come_at_random_at_their_rate():
    times = list(arrivals(50, 100, seed=3))
    assert 4700 < len(times) < 5300
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 100
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    # Of a Poisson clock half of the gaps are shorter than 0.69 of the mean.
    assert gaps[len(gaps) // 2] == pytest.approx(0.693 / 50, rel=0.1)


def exchange(
    status: int = 200, code: str = "", *, is_whole: bool = True, ttft: float = 1.0, gap: float = 0.1
) -> Exchange:
    times = [ttft + gap * number for number in range(4)] if status == 200 else []
    return Exchange(True, 4, status, code, is_whole=is_whole, token_s=times, end_s=ttft + 4 * gap)


def test_a_request_is_answered_refused_or_lost():
    run = Run(
        seconds=10,
        exchanges=[
            exchange(),
            exchange(ttft=7.0),
            exchange(gap=0.5),
            exchange(429, "queue_full", is_whole=False),
            exchange(503, "shutting_down", is_whole=False),
            exchange(200, "internal_error"),
            exchange(200, is_whole=False),
            exchange(0, "ConnectionResetError", is_whole=False),
            exchange(500, "internal_error", is_whole=False),
        ],
        resident_bytes=[5, 9, 7],
    )
    found = Figures.of(run, Goals(ttft_s=5, gap_s=0.3))
    assert (found.num_offered, found.num_answered, found.num_refused, found.num_lost) == (9, 3, 2, 4)
    assert (found.answers_per_s, found.good_per_s, found.tokens_per_s) == (0.3, 0.1, 1.2)
    assert found.ttft_s[100] == 7.0
    assert found.resident_bytes == (5, 9, 7)
    assert found.faults(queue_seconds=30) == ["4 requests got neither an answer nor a refusal"]
    assert len(found.faults(queue_seconds=1)) == 2


def test_the_lag_is_read_from_the_buckets_of_a_run():
    text = 'hivtp:event_loop_lag_seconds_bucket{le="%s",model_name="x"} %s\n'
    before = read_metrics(text % ("0.01", 5.0) + text % ("0.1", 6.0) + text % ("+Inf", 6.0))
    after = read_metrics(text % ("0.01", 103.0) + text % ("0.1", 106.0) + text % ("+Inf", 106.0))
    assert bucket_quantile(before, after, "event_loop_lag_seconds", 0.98) == 0.01
    assert bucket_quantile(before, after, "event_loop_lag_seconds", 0.99) == 0.1
    assert bucket_quantile(before, before, "event_loop_lag_seconds", 0.99) is None


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", b"\x00\x01nothing"])
def test_a_server_that_breaks_off_is_noted(answer: bytes):
    async def run() -> Exchange:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await ask(f"http://127.0.0.1:{port}", body("what", 4, streams=True))
        server.close()
        return found

    found = asyncio.run(run())
    assert found.code
    assert not found.is_answered
    assert not found.is_refused


def test_a_client_goes_away_when_it_has_waited_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.serving.client.PATIENCE_SECONDS", 0.2)

    async def run() -> Exchange:
        server = await asyncio.start_server(lambda reader, _: reader.read(), "127.0.0.1", 0)
        found = await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", body("what", 4, streams=True))
        server.close()
        return found

    found = asyncio.run(run())
    assert (found.status, found.code) == (0, "TimeoutError")
    assert 0.2 <= found.end_s < 5


def test_the_script_loads_servers_and_writes_what_it_found(
    pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # What an event loop on a machine with other work to do is late by is no matter of this test.
    monkeypatch.setattr("benchmarks.serving.figures.MAX_LAG_SECONDS", 60.0)
    output = tmp_path / "serve.json"
    options = ["--bundle", str(pruned_bundle), "--threads=1", "--rates", "0.3", "--seconds=2", "--images=40"]
    with pytest.raises(SystemExit) as ended:
        serve.main([*options, "--output", str(output)])
    assert ended.value.code == 0, capsys.readouterr().out
    written = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    [load] = written["loads"]
    assert set(load["systems"]) == {serve.BATCHED, serve.ONE_SLOT}
    for figures in load["systems"].values():
        assert figures["num_offered"] == figures["num_answered"] + figures["num_refused"]
        assert figures["num_answered"] > 0
        assert figures["ttft_s"]["50"] > 0
        assert figures["lag_s"] > 0
        assert figures["resident_bytes"][1] > 2**20
    assert written["memory"]["num_images"] == 40
    assert len(written["memory"]["resident_bytes"]) == 2
    assert written["faults"] == []
    [page] = serving_parts(written, written)
    assert "| 0.3 x capacity | offered | answered |" in page
    assert f"| {serve.BATCHED} |" in page
    assert "Memory over 40 distinct images" in page
    assert serving_parts(None, written) == []


def test_every_image_of_the_memory_test_is_another():
    traffic = Traffic(seed=7)
    requests = list(islice(iter(lambda: traffic.image_request(2), None), 30))
    assert len(set(requests)) == 30
