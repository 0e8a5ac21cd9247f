"""The server on a cluster of Ray: answers, streams, sessions, and what becomes of them when replicas come and go."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.answers import load
from tests.support.serving import asking, body, random_image, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"


def post(url: str, content: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post(CHAT, json=body(content, **fields), headers=headers)


def words(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    found: str = response.json()["choices"][0]["message"]["content"]
    return found


def replicas() -> list[Any]:
    """The replicas of the server that run."""
    from ray import serve

    return [replica for replica in serve.status().applications["hivtp"].deployments["hivtp"].replica_states.items()]


def num_running() -> int:
    return dict(replicas()).get("RUNNING", 0)


def actors() -> list[Any]:
    """Handles of the replicas of the server."""
    import ray

    names = [item["name"] for item in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if "SERVE_REPLICA::hivtp#hivtp#" in name]


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]


def test_answers_are_those_of_the_server_alone(deploy, exact_bundle):
    url = deploy(exact_bundle, min_replicas=2, max_replicas=2)
    questions = [asking("what is this?", random_image(seed)) for seed in range(6)]
    with serving(load(exact_bundle).model) as alone, ThreadPoolExecutor(6) as threads:
        expected = [alone.answer(question) for question in questions]
        assert list(threads.map(lambda question: words(post(url, question)), questions)) == expected
    response = post(url, questions[0], stream=True)
    *chunks, done = events(response)
    assert done == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == expected[0]
    assert sum(map(bool, deltas)) > 1
    # Errors and small endpoints pass as they are.
    assert post(url, "", model="other").status_code == 400
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["visual_tokens_per_tile"] == {"before": 64, "kept": 21}
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
    assert "hivtp" in httpx.get(f"{url}/").text


def test_a_session_stays_with_its_replica(deploy, exact_bundle):
    """Its second turn finds the KV cache of the first."""
    url = deploy(exact_bundle, min_replicas=2, max_replicas=2)
    image = random_image(50)

    def cached(session: str) -> int:
        headers = {"x-session-id": session}
        first = asking("what is this?", image)
        answer = words(post(url, first, headers))
        messages = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "and where?"},
        ]
        found = httpx.post(url + CHAT, json={"messages": messages, "max_tokens": 4}, headers=headers, timeout=60)
        return int(found.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert all(cached(f"session-{number}") > 20 for number in range(4))


def test_a_replica_that_is_killed_costs_only_what_it_was_answering(deploy, exact_bundle):
    import ray

    url = deploy(exact_bundle, min_replicas=2, max_replicas=2, server={"num_slots": 8})
    question = asking("what is this?", random_image(1))
    expected = words(post(url, question))
    results: list[Any] = []
    stops = threading.Event()

    def ask_again_and_again(number: int) -> None:
        while not stops.is_set():
            response = post(url, question, {"x-session-id": str(number)}, stream=True)
            results.append((time.monotonic(), response.status_code, events(response)))

    with ThreadPoolExecutor(6) as threads:
        for number in range(6):
            threads.submit(ask_again_and_again, number)
        # Long answers, which are in the middle when the replica goes.
        long = [
            threads.submit(
                post, url, question, {"x-session-id": f"long-{number}"}, stream=True, max_tokens=300, ignore_eos=True
            )
            for number in range(0)
        ]
        wait_for(lambda: len(results) > 12, 60)
        killed_at = time.monotonic()
        ray.kill(actors()[0], no_restart=True)
        wait_for(lambda: len([item for item in results if item[0] > killed_at]) > 12, 60)
        wait_for(lambda: num_running() == 2, 60)
        stops.set()
        assert not long
    for _, status, found in results:
        *chunks, done = found
        assert status in (200, 503)
        if status == 200:
            assert done == "[DONE]"
            last = json.loads(chunks[-1])
            whole = "".join(
                json.loads(chunk)["choices"][0]["delta"].get("content") or ""
                for chunk in chunks
                if '"choices"' in chunk
            )
            assert whole == expected or last["error"]["code"] == "replica_lost"
    lost = [found for _, status, found in results if status == 503 or '"error"' in found[-2]]
    # Not more than were on their way.
    assert len(lost) <= 6
