"""Downloads an image from a host that the operator named, over a connection to an address that was checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import cache
from typing import TYPE_CHECKING

from hivtp.runtime.serving.images.addresses import is_allowed, is_public, parse_address
from hivtp.runtime.serving.images.data_uri import EXAMPLE, too_large
from hivtp.runtime.serving.protocol.errors import ApiError, invalid

if TYPE_CHECKING:
    import h11

    from hivtp.runtime.serving.images.addresses import Address
    from hivtp.runtime.serving.settings import ServerSettings

MAX_HEADER_BYTES = 64 * 2**10


async def fetch(url: str, param: str, settings: ServerSettings) -> bytes:
    """Download an image.

    The host is looked up once, and the connection goes to an address that this gave; all of them must be public.
    Redirects are not followed, nor is a proxy asked.

    Args:
        url: what the client sent.
        param: where it stands in the request.
        settings: which hosts, and how much time and how many bytes.

    Raises:
        ApiError: the address is not allowed (400), or cannot be fetched (422).
    """
    if not settings.image_domains:
        raise invalid(f"{param} must be a data: URI: this server fetches no images; send {EXAMPLE}", param)
    try:
        address = parse_address(url)
    except ValueError as error:
        raise invalid(f"{param} cannot be fetched: {error}; send {EXAMPLE}", param) from error
    if not is_allowed(address, settings.image_domains):
        raise invalid(f"{param}: this server fetches no images from {address.host_header}", param, "host_not_allowed")
    try:
        async with asyncio.timeout(settings.fetch_seconds):
            return await _download(address, param, settings.max_image_bytes)
    except TimeoutError as error:
        raise _unfetched(param, f"it took more than {settings.fetch_seconds:g} seconds") from error
    except (OSError, ValueError) as error:
        # Without the error's own words, which may tell of the network around the server.
        raise _unfetched(param, "the host did not answer as it should") from error


async def _download(address: Address, param: str, max_bytes: int) -> bytes:
    ip = await _look_up(address, param)
    context = _tls() if address.scheme == "https" else None
    name = address.host if context is not None else None
    reader, writer = await asyncio.open_connection(ip, address.port, ssl=context, server_hostname=name)
    try:
        return await _get(reader, writer, address, param, max_bytes)
    finally:
        writer.transport.abort()


async def _look_up(address: Address, param: str) -> str:
    """An address of the host, after all of them were checked."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    ips = [str(place[0]) for *_, place in found]
    if not ips or not all(map(is_public, ips)):
        raise invalid(f"{param}: {address.host} is not a public host", param, "host_not_allowed")
    return ips[0]


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: Address, param: str, max_bytes: int
) -> bytes:
    import h11

    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
    headers = [("host", address.host_header), ("user-agent", "hivtp"), ("accept", "image/*")]
    headers += [("accept-encoding", "identity"), ("connection", "close")]
    request = h11.Request(method="GET", target=address.target, headers=headers)
    writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    content = bytearray()
    while True:
        try:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(2**16))
                continue
        except h11.RemoteProtocolError as error:
            raise _unfetched(param, "the host does not speak HTTP") from error
        if isinstance(event, h11.Response):
            _check_response(event, param, max_bytes)
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > max_bytes:
                raise too_large(param, max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content)
        elif not isinstance(event, h11.InformationalResponse):
            raise _unfetched(param, "the host broke off")


def _check_response(response: h11.Response, param: str, max_bytes: int) -> None:
    headers = dict(response.headers)
    if 300 <= response.status_code < 400:
        raise _unfetched(param, "the host names another address, and redirects are not followed")
    if response.status_code != 200:
        raise _unfetched(param, f"the host answered with status {response.status_code}")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise _unfetched(param, "the host sent it compressed")
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise too_large(param, max_bytes)


def _unfetched(param: str, reason: str) -> ApiError:
    message = f"{param} could not be fetched: {reason}; send the image itself, as {EXAMPLE}"
    return ApiError(422, message, "image_not_fetched", param)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
