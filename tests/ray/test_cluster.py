"""The server on a cluster of Ray: answers, streams, sessions, and what becomes of them when replicas come and go."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx
import pytest

from tests.support.answers import load
from tests.support.serving import asking, body, random_image, serving, wait_for

pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"


def post(url: str, content: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post(CHAT, json=body(content, **fields), headers=headers)


def words(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    found: str = response.json()["choices"][0]["message"]["content"]
    return found


def num_running() -> int:
    """Replicas of the server that run."""
    from ray import serve

    states = serve.status().applications["hivtp"].deployments["hivtp"].replica_states
    return int(states.get("RUNNING", 0))


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


class Load:
    """Clients that ask again and again, each in a session of its own.

    Attributes:
        answers: whole ones, as they came.
        errors: what clients were told instead; codes of errors.
    """

    def __init__(self, url: str, num_clients: int, content: Any) -> None:
        self._url = url
        self._content = content
        self._stops = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(num_clients)]
        self.answers: list[str] = []
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_more(self, number: int) -> None:
        wanted = len(self.answers) + number
        wait_for(lambda: len(self.answers) >= wanted, 90)

    def _run(self, number: int) -> None:
        while not self._stops.is_set():
            response = post(self._url, self._content, {"x-session-id": str(number)}, stream=True)
            if response.status_code != 200:
                self.errors.append(response.json()["error"]["code"])
                continue
            *chunks, done = [*map(json.loads, events(response)[:-1]), events(response)[-1]]
            assert done == "[DONE]"
            error = next((chunk["error"] for chunk in chunks if "error" in chunk), None)
            if error is None:
                self.answers.append("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks))
            else:
                self.errors.append(error["code"])


def test_a_replica_that_is_killed_costs_only_what_it_was_answering(deploy, exact_bundle):
    import ray

    url = deploy(exact_bundle, min_replicas=2, max_replicas=2)
    question = asking("what is this?", random_image(1))
    expected = words(post(url, question))
    with Load(url, 6, question) as load_:
        load_.wait_for_more(12)
        ray.kill(actors()[0], no_restart=True)
        load_.wait_for_more(24)
        wait_for(lambda: num_running() == 2 and len(actors()) == 2, 90)
        load_.wait_for_more(12)
    assert set(load_.answers) == {expected}
    assert set(load_.errors) <= {"replica_lost"}
    # Of six clients no more than one request each was on its way.
    assert len(load_.errors) <= 6


def test_a_stream_whose_replica_ends_says_so(deploy, exact_bundle):
    import ray

    url = deploy(exact_bundle, min_replicas=2, max_replicas=2)
    fields = {"stream": True, "max_tokens": 400, "ignore_eos": True}
    request = body(asking("what is this?", random_image(2)), **fields)
    with (
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        client.stream("POST", CHAT, json=request) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        for actor in actors():
            ray.kill(actor, no_restart=True)
        rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["error"]["code"] == "replica_lost"


def test_a_client_that_leaves_frees_its_slot(deploy, exact_bundle):
    """With one slot the next answer would wait for the whole of the one before it."""
    url = deploy(exact_bundle, server={"num_slots": 1, "max_queued": 4})
    long = body(asking("what is this?", random_image(3)), stream=True, max_tokens=440, ignore_eos=True)

    def running() -> float:
        text = httpx.get(f"{url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("hivtp:num_requests_running")]
        return float(lines[0].rpartition(" ")[2])

    with (
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        client.stream("POST", CHAT, json=long) as response,
    ):
        next(response.iter_lines())
    wait_for(lambda: running() == 0, 20)
    text = httpx.get(f"{url}/metrics").text
    assert 'hivtp:request_failure_total{code="client_gone"' in text.replace(", ", ",") or "client_gone" in text


def test_replicas_follow_the_load(deploy, exact_bundle):
    url = deploy(
        exact_bundle, min_replicas=1, max_replicas=2, target_requests=1, upscale_seconds=1.0, downscale_seconds=2.0
    )
    assert num_running() == 1
    with Load(url, 6, asking("what is this?", random_image(4))) as load_:
        wait_for(lambda: num_running() == 2, 90)
        load_.wait_for_more(6)
    assert load_.errors == []
    wait_for(lambda: num_running() == 1, 120)


def test_another_bundle_is_deployed_without_a_lost_request(deploy, exact_bundle, unpruned_bundle):
    question = asking("what is this?", random_image(5))
    deploy(unpruned_bundle, min_replicas=2, max_replicas=2)
    url = deploy(exact_bundle, min_replicas=2, max_replicas=2)
    before = words(post(url, question))
    with Load(url, 4, question) as load_:
        load_.wait_for_more(4)
        deploy(unpruned_bundle, min_replicas=2, max_replicas=2)
        load_.wait_for_more(8)
    after = words(post(url, question))
    assert load_.errors == []
    assert before != after
    assert set(load_.answers) == {before, after}


def test_a_vision_stage_that_replicas_share(deploy, exact_bundle):
    """Tiles of several requests go through the graph in one run, and each answer is the one of its image alone."""
    url = deploy(exact_bundle, min_replicas=2, max_replicas=2, vision_replicas=1, batch_seconds=0.2)
    questions = [asking("what is this?", random_image(seed)) for seed in range(60, 66)]
    with serving(load(exact_bundle).model) as alone, ThreadPoolExecutor(6) as threads:
        expected = [alone.answer(question) for question in questions]
        assert list(threads.map(lambda question: words(post(url, question)), questions)) == expected
