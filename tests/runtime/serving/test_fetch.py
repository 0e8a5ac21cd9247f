"""Images from an address: only from hosts that the operator named, at addresses of the internet, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.runtime.serving.images import fetch as fetching
from hivtp.runtime.serving.images.addresses import is_allowed, is_public, parse_address
from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.settings import ServerSettings
from tests.support.serving import asking, random_image, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hivtp import Pipeline

IMAGE = random_image(1)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "168.63.129.16",
        "192.88.99.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
        "localhost",
        "",
    ],
)
def test_an_address_around_the_server_is_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "100.63.0.1"]
)
def test_an_address_of_the_internet_is_public(address: str):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://a.example/",
        "http:///x",
        "http://user@a.example/",
        "http://user:word@a.example/",
        "http://a.example\\@b.example/",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://a.example/ b",
        "http://a.example/\r\nhost: b",
        "http://[::1/",
        "http://[fe80::1%25lo]/",
        "http://.a/",
        "http://a..b/",
        "http://a.example/" + "a" * 9000,
    ],
)
def test_an_odd_address_is_refused(url: str):
    with pytest.raises(ValueError, match=r".+"):
        parse_address(url)


def test_an_address_is_taken_apart():
    found = parse_address("HTTPS://B\u00dccher.Example.:8443/a b?c=%20\u00e9#d".replace(" ", "%20"))
    assert (found.scheme, found.host, found.port) == ("https", "xn--bcher-kva.example", 8443)
    assert found.target == "/a%20b?c=%20%C3%A9"
    assert found.host_header == "xn--bcher-kva.example:8443"
    assert parse_address("http://[2606:4700::1111]/").host_header == "[2606:4700::1111]"


@pytest.mark.parametrize(
    ("url", "domains", "allowed"),
    [
        ("http://a.example/", ["a.example"], True),
        ("https://A.EXAMPLE./", ["a.example"], True),
        ("http://a.example:81/", ["a.example"], False),
        ("http://a.example:81/", ["a.example:81"], True),
        ("http://a.example/", ["a.example:81"], False),
        ("http://b.a.example/", ["a.example"], False),
        ("http://b.a.example/", ["*.a.example"], True),
        ("http://a.example/", ["*.a.example"], False),
        ("http://evila.example/", ["*.a.example"], False),
        ("http://a.example.evil.example/", ["a.example"], False),
        ("http://a.example/", [], False),
    ],
)
def test_the_operator_names_hosts(url: str, domains: list[str], allowed: bool):
    assert is_allowed(parse_address(url), domains) is allowed


class Host:
    """A web server of this machine that does as it is told, and stands for one of the internet."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.requests: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self.requests.append(connection.recv(65536))
                self._answer(connection)

    def close(self) -> None:
        # A thread that waits for a connection keeps the socket open otherwise.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def sending(*parts: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)

    return answer


def endless(start: bytes, part: bytes, pause: float) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(part)
            time.sleep(pause)

    return answer


def response(content: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + content


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Host]]:
    """Makes hosts of this machine that count as public, under the name images.example."""
    hosts: list[Host] = []

    def make(answer: Callable[[socket.socket], None]) -> Host:
        hosts.append(Host(answer))
        resolve_to(monkeypatch, ["127.0.0.1"])
        monkeypatch.setattr(fetching, "is_public", lambda _address: True)
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def resolve_to(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> list[str]:
    """Every name leads to these addresses; the names that were asked for."""
    asked: list[str] = []

    async def getaddrinfo(_loop: Any, host: str, port: int, **_options: Any) -> list[Any]:
        if host not in addresses:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def download(port: int, path: str = "/a.png", **settings: Any) -> bytes:
    found = ServerSettings(image_domains=(f"images.example:{port}",), **settings)
    return asyncio.run(fetching.fetch(f"http://images.example:{port}{path}", "there", found))


def refusal(port: int, **settings: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        download(port, **settings)
    assert caught.value.param == "there"
    return caught.value


def test_an_image_is_downloaded(internet: Callable[..., Host]):
    host = internet(sending(response(IMAGE[:30], f"content-length: {len(IMAGE)}"), IMAGE[30:]))
    assert download(host.port, "/a%20b?c=d") == IMAGE
    head = host.requests[0].decode()
    assert head.startswith("GET /a%20b?c=d HTTP/1.1\r\n")
    assert f"host: images.example:{host.port}\r\n" in head.lower()
    assert "cookie" not in head.lower()


def test_a_body_in_chunks_or_until_the_end_is_downloaded(internet: Callable[..., Host]):
    chunked = f"{len(IMAGE):x}\r\n".encode() + IMAGE + b"\r\n0\r\n\r\n"
    assert download(internet(sending(response(chunked, "transfer-encoding: chunked"))).port) == IMAGE
    assert download(internet(sending(response(IMAGE))).port) == IMAGE


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent", "304 Same"])
def test_redirects_are_not_followed(internet: Callable[..., Host], status: str):
    target = internet(sending(response(IMAGE)))
    host = internet(sending(response(b"", f"location: http://127.0.0.1:{target.port}/", status=status)))
    assert refusal(host.port).status == 422
    assert target.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        sending(response(b"", status="404 Not Found")),
        sending(response(b"", status="500 No")),
        sending(response(b"x", "content-encoding: gzip", "content-length: 1")),
        sending(response(b"abc", "content-length: 10")),
        sending(response(b"abc", "content-length: ten")),
        sending(b"SSH-2.0-OpenSSH\r\n"),
        sending(b""),
        endless(b"HTTP/1.1 200 OK\r\n", b"x: " + b"y" * 1000 + b"\r\n", 0.0),
    ],
    ids=["404", "500", "compressed", "cut", "odd length", "not HTTP", "nothing", "endless headers"],
)
def test_a_host_that_gives_no_image_is_named_no_further(internet: Callable[..., Host], answer: Any):
    error = refusal(internet(answer).port, fetch_seconds=5)
    assert (error.status, error.code) == (422, "image_not_fetched")


@pytest.mark.parametrize(
    "answer",
    [
        endless(response(b"", "content-length: 9999999"), b"x" * 1000, 0.0),
        endless(response(b""), b"x" * 1000, 0.0),
        endless(response(b"", "transfer-encoding: chunked"), b"3e8\r\n" + b"x" * 1000 + b"\r\n", 0.0),
    ],
    ids=["announced", "endless", "endless chunks"],
)
def test_a_body_that_is_too_large_is_left(internet: Callable[..., Host], answer: Any):
    assert refusal(internet(answer).port, max_image_bytes=50_000).status == 413


@pytest.mark.parametrize(
    "answer",
    [
        lambda _connection: time.sleep(2),
        endless(b"HTTP/1.1 200 OK\r\nx: ", b"y", 0.05),
        endless(response(b"", "content-length: 1000"), b"x", 0.05),
    ],
    ids=["silent", "slow headers", "slow body"],
)
def test_the_time_is_for_the_whole_download(internet: Callable[..., Host], answer: Any):
    started = time.monotonic()
    assert refusal(internet(answer).port, fetch_seconds=0.3).status == 422
    assert time.monotonic() - started < 1.5


FORBIDDEN = ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "0.0.0.0"]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_a_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch, address: str):
    resolve_to(monkeypatch, [address])
    assert refusal(80).code == "host_not_allowed"
    # Also where other addresses of the name are public.
    resolve_to(monkeypatch, ["8.8.8.8", address])
    assert refusal(80).code == "host_not_allowed"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f.1",
        "127.1",
        "0",
        "0.0.0.0",
        "017700000001",
    ],
)
def test_all_names_of_this_machine_are_refused_even_where_the_operator_wrote_them(host: str):
    settings = ServerSettings(image_domains=(host.strip("[]"),))
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetching.fetch(f"http://{host}/a.png", "there", settings))
    assert caught.value.status in (400, 422)
    assert caught.value.code in ("host_not_allowed", "image_not_fetched")


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch):
    """A resolver that gives a public address to whoever checks, and this machine to whoever connects."""
    host = Host(sending(response(IMAGE)))
    connected: list[str] = []
    asked = resolve_to(monkeypatch, ["8.8.8.8"])

    async def open_connection(address: str, _port: int, **_options: Any) -> Any:
        connected.append(address)
        raise OSError

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    assert refusal(host.port).status == 422
    assert connected == ["8.8.8.8"]
    assert asked == ["images.example"]
    host.close()


def test_a_name_that_does_not_exist_says_nothing_of_the_network(monkeypatch: pytest.MonkeyPatch):
    async def getaddrinfo(*_arguments: Any, **_options: Any) -> Any:
        raise socket.gaierror(-2, "no resolver at 10.0.0.53")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    error = refusal(80)
    assert error.status == 422
    assert "10.0.0" not in error.message


def test_a_certificate_is_checked_for_the_name(internet: Callable[..., Host]):
    host = internet(sending(response(IMAGE)))
    settings = ServerSettings(image_domains=(f"images.example:{host.port}",))
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetching.fetch(f"https://images.example:{host.port}/", "there", settings))
    assert caught.value.status == 422
    assert fetching._tls().check_hostname


def test_a_chat_about_an_image_of_the_internet(pruned: Pipeline, internet: Callable[..., Host]):
    host = internet(sending(response(IMAGE)))
    url = f"http://images.example:{host.port}/a.png"
    with serving(pruned.model, image_domains=(f"images.example:{host.port}",)) as server:
        assert server.answer(asking("what", url)) == server.answer(asking("what", IMAGE))
        other = server.chat(asking("what", "http://other.example/a.png"))
        assert (other.status_code, other.json()["error"]["code"]) == (400, "host_not_allowed")
        host.close()
        gone = server.chat(asking("what", url))
        assert (gone.status_code, gone.json()["error"]["param"]) == (422, "messages[0].content[1].image_url.url")
        counted = server.client.post("/tokenize", json={"messages": [{"role": "user", "content": asking("a", url)}]})
        assert counted.status_code == 400
