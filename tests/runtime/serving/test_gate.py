"""Who may come in, and with what: keys, hosts, headers, bodies, and what becomes of those that are refused."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.serving.settings import ServerSettings
from hivtp_ops.errors import SettingsError
from tests.support.serving import CHAT, asking, body, data_uri, random_image, serving, wait_for

if TYPE_CHECKING:
    import socket

    from hivtp import Pipeline
    from tests.support.serving import Server


def test_keys_are_wanted_everywhere_but_where_balancers_and_browsers_look(pruned: Pipeline):
    with serving(pruned.model, api_keys=("first-key", "second-key")) as server:
        for path in ("/health", "/ready", "/", "/playground/app.js"):
            assert server.client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/nothing"):
            response = server.client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("first-key", "second-key"):
            headers = {"authorization": f"Bearer {key}"}
            assert server.client.post(CHAT, json=body("what"), headers=headers).status_code == 200
            assert server.client.get("/metrics", headers=headers).status_code == 200
        for value in ("Bearer", "Bearer first", "Bearer first-key2", "first-key", "Basic first-key"):
            refused = server.client.post(CHAT, json=body("what"), headers={"authorization": value})
            assert refused.status_code == 401
            assert "first-key" not in refused.text


def test_a_key_is_refused_before_its_body_is_read(pruned: Pipeline):
    with serving(pruned.model, api_keys=("key",)) as server, server.raw() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 1000000\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_the_host_is_checked_on_loopback(pruned: Pipeline):
    with serving(pruned.model, allowed_hosts=("proxy.example",)) as server:
        port = server.port
        for host in ("127.0.0.1", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST", "proxy.example"):
            assert server.client.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "[::"):
            response = server.client.get("/v1/models", headers={"host": host})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
        assert server.client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_beyond_loopback_any_host_may_be_meant(pruned: Pipeline):
    with serving(pruned.model, host="0.0.0.0", is_insecure=True) as server:
        assert server.client.get("/v1/models", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_strangers_are_let_in_only_on_purpose(host: str):
    with pytest.raises(SettingsError, match="--api-key, or --insecure"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("a",)).api_keys == ("a",)
    assert ServerSettings(host=host, is_insecure=True).is_insecure


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 70000},
        {"num_slots": 0},
        {"num_slots": True},
        {"max_queued": 1.5},
        {"request_seconds": 0},
        {"request_seconds": float("inf")},
        {"request_seconds": "1"},
        {"api_keys": ["a"]},
        {"api_keys": ("a\n",)},
        {"api_keys": (" a",)},
        {"api_keys": ("",)},
        {"image_domains": "example.org"},
        {"log_format": "xml"},
        {"is_insecure": 1},
        {"host": None},
        {"chunk_size": 0},
        {"max_tokens": 0},
    ],
)
def test_a_setting_that_cannot_be_is_refused(wrong: dict[str, Any]):
    with pytest.raises(SettingsError):
        ServerSettings(**wrong)


def test_web_pages_of_elsewhere_may_not_use_it_by_default(server: Server):
    origin = {"origin": "https://evil.example"}
    asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in server.client.options(CHAT, headers=asked).headers
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=origin).headers
    # What a page can send without asking first is not JSON.
    text = server.client.post(CHAT, content=json.dumps(body("what")), headers={"content-type": "text/plain", **origin})
    assert text.status_code == 415


def test_web_pages_that_the_operator_names_may(pruned: Pipeline):
    with serving(pruned.model, allowed_origins=("https://app.example",), api_keys=("k",)) as server:
        origin = {"origin": "https://app.example"}
        asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = server.client.options(CHAT, headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        # A page can read why it was refused, too.
        refused = server.client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = server.client.get("/v1/models", headers={"origin": "https://evil.example", "authorization": "Bearer k"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_a_body_that_is_not_json_is_refused(server: Server, headers: dict[str, str]):
    response = server.client.post(CHAT, content=json.dumps(body("what")).encode(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_json_may_name_its_letters(server: Server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.client.post(CHAT, content=json.dumps(body("what")).encode(), headers=headers).status_code == 200


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused_while_it_is_sent(pruned: Pipeline, is_announced: bool):
    with serving(pruned.model, max_body_bytes=100_000) as server:
        chunk = b"x" * 10_000

        def parts() -> Any:
            for _ in range(300):
                yield chunk

        headers = {"content-type": "application/json"}
        content = chunk * 300 if is_announced else parts()
        response = server.client.post(CHAT, content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert server.service.admission.num_waiting_bytes == 0
        assert server.chat("what").status_code == 200


def test_a_refused_client_that_sends_for_ever_is_cut_off(pruned: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hivtp.runtime.serving.http.connection.LINGER_SECONDS", 0.3)
    with serving(pruned.model, max_body_bytes=1000) as server, server.raw() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        assert seconds_until_closed(connection, b"400\r\n" + b"x" * 1024 + b"\r\n") < 5


def seconds_until_closed(connection: socket.socket, part: bytes) -> float:
    """Send the same again and again."""
    started = time.monotonic()
    while time.monotonic() - started < 10:
        try:
            connection.sendall(part)
        except OSError:
            break
        time.sleep(0.01)
    return time.monotonic() - started


def read_all(connection: socket.socket) -> bytes:
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


def test_headers_must_come_in_time_and_be_few(pruned: Pipeline):
    with serving(pruned.model, header_seconds=0.3, max_header_bytes=4096) as server:
        with server.raw() as connection:
            assert read_all(connection) == b""
        with server.raw() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
            found = read_all(connection)
            assert found.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in found
        # One that trickles has no more time.
        with server.raw() as connection:
            assert seconds_until_closed(connection, b"G") < 3
        large = server.client.get("/health", headers={"x-large": "y" * 5000})
        assert (large.status_code, large.json()["error"]["code"]) == (431, "headers_too_large")
        with server.raw() as connection:
            for _ in range(20):
                try:
                    connection.sendall(b"x" * 1000)
                except OSError:
                    break
            assert b'"code":"invalid_http"' in read_all_quietly(connection)
        # A connection may rest between two requests for as long as uvicorn lets it.
        assert server.client.get("/health").status_code == 200
        time.sleep(0.1)
        assert server.client.get("/health").status_code == 200


def read_all_quietly(connection: socket.socket) -> bytes:
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except OSError:
        pass
    return content


def test_a_body_must_come_in_time(pruned: Pipeline):
    with serving(pruned.model, body_seconds=0.3) as server, server.raw() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        found = connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert server.service.admission.num_waiting_bytes == 0


def test_what_is_not_http_is_refused_in_json(server: Server):
    with server.raw() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        found = read_all(connection)
        assert found.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid_http"' in found


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models", 404),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/playground/../settings.py", 404),
        ("GET", "/playground/%2e%2e/settings.py", 404),
        ("GET", "/playground/", 404),
        ("GET", "/playground/nothing.js", 404),
    ],
)
def test_every_refusal_is_an_error_object(server: Server, method: str, path: str, status: int):
    response = server.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert response.headers["allow"]
    if path == "/v1/completions":
        assert "/v1/chat/completions" in response.json()["error"]["message"]


def test_the_model_has_names(server: Server, pruned: Pipeline):
    assert server.chat("what", model="hivtp").status_code == 200
    assert server.chat("what", model="").status_code == 200
    unknown = server.chat("what", model="gpt-4")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "hivtp" in unknown.json()["error"]["message"]
    with serving(pruned.model) as other:
        names = [card["id"] for card in other.client.get("/v1/models").json()["data"]]
        assert names == [pruned.model.bundle.manifest.source.name, "hivtp"]
        assert other.chat("what", model="hivtp").json()["model"] == names[0]
    with serving(pruned.model, model_names=("org/one", "two")) as other:
        assert other.client.get("/v1/models/org/one").json()["id"] == "org/one"
        assert other.client.get("/v1/models/two").json()["root"] == "org/one"
        assert other.chat("what", model="hivtp").status_code == 404


def test_answers_have_a_number(server: Server):
    assert server.client.get("/health", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for odd in ("a b", "a" * 200, "x;y"):
        found = server.client.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert found != odd
        assert len(found) == 32
    assert len({server.chat("what").json()["id"] for _ in range(3)}) == 3


def test_ignored_fields_are_named(server: Server):
    response = server.chat("what", **{"temperatur": 1, "user": "u", "bad\r\nname: x": 1, "tools": []})
    assert response.headers["hivtp-ignored"] == "temperatur, user, tools"
    assert "hivtp-ignored" not in server.chat("what").headers


def test_the_page_may_do_what_it_needs_and_no_more(server: Server):
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "trusted-types 'none'" in policy
    # All that it names is there, and comes from here.
    names = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
    assert {"playground/app.js", "playground/style.css", "playground/icon.svg"} == names
    scripts = ["playground/app.js"]
    for name in scripts:
        script = server.client.get(f"/{name}")
        assert script.headers["content-type"].startswith("text/javascript")
        scripts += {f"playground/{other}" for other in re.findall(r'from "\./(\w+\.js)"', script.text)} - {*scripts}
    assert len(scripts) > 5
    for name in (*names, *scripts):
        found = server.client.get(f"/{name}")
        assert (found.status_code, found.headers["content-security-policy"]) == (200, policy)
        assert not re.search("innerHTML|insertAdjacent|outerHTML|document.write|eval", found.text)
    assert "http:" not in page.text.replace("http-equiv", "")
    assert "https:" not in page.text
    assert server.client.head("/").status_code == 200


def test_state(pruned: Pipeline):
    with serving(pruned.model) as server:
        assert server.client.get("/health").json() == {"status": "ok"}
        assert server.client.get("/ready").json() == {"status": "ready"}
        server.service.admission.is_closed = True
        ready = server.client.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert server.client.get("/health").status_code == 200
        refused = server.chat("what")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1


def test_two_requests_of_one_connection(server: Server):
    content = json.dumps(body(asking("what", data_uri(random_image(4))))).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
    with server.raw() as connection:
        connection.sendall(request + request)
        found = b""

        def has_both() -> bool:
            nonlocal found
            found += connection.recv(65536)
            return found.count(b"HTTP/1.1 200 OK") == 2 and found.count(b'"total_tokens"') == 2

        wait_for(has_both)
