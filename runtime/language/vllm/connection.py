"""HTTP with a server of vLLM: one connection for each request, which another thread may close."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from hivtp_ops.errors import BackendUnavailableError, EngineError, PromptError, SettingsError

if TYPE_CHECKING:
    from types import TracebackType

    from hivtp.runtime.language.options import LanguageOptions

CONNECT_SECONDS = 10.0
# A line holds the ids of a whole prompt at most.
MAX_LINE_BYTES = 2**22
MAX_BODY_BYTES = 2**22
MAX_RETRY_SECONDS = 120.0


class LostConnectionError(BackendUnavailableError):
    """A server that cannot be reached, or that ended a connection, or that failed: another try may succeed."""


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is, and what it wants to be told.

    Attributes:
        url: for messages; holds no secrets.
        is_secure: speaks TLS.
        host, port: to connect to.
        path: before that of each endpoint.
        headers: of each request.
        max_silence: seconds to wait for the next byte.
    """

    url: str
    is_secure: bool
    host: str
    port: int
    path: str
    headers: dict[str, str]
    max_silence: float

    @classmethod
    def of(cls, options: LanguageOptions) -> Self:
        """Read the options.

        Raises:
            SettingsError: the url is none of a server.
        """
        url = options.url or ""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise SettingsError(f"the url of the vLLM server cannot be read: {error}") from error
        if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise SettingsError(
                'the url of the vLLM server must be scheme, host and port, such as "http://host:8000"; a key goes into '
                "api_key"
            )
        is_secure = parts.scheme == "https"
        key = options.api_key
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        # Clients of OpenAI are given the url with it.
        path = parts.path.rstrip("/").removesuffix("/v1")
        port = (443 if is_secure else 80) if port is None else port
        return cls(url, is_secure, parts.hostname, port, path, headers, options.max_silence)


class Connection:
    """A request to the server and its answer.

    Args:
        address: of the server.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._is_closed = False
        host, port = address.host, address.port
        if address.is_secure:
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
            )
        else:
            self._http = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        self._response: http.client.HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
        self._http.close()
        if self._response is not None:
            self._response.close()

    def close(self) -> None:
        """Give the request up, from any thread: the server stops decoding, and who waits for a byte gets an error."""
        with self._lock:
            self._is_closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, method: str, path: str, body: bytes | None = None) -> None:
        """Send a request, and wait for the beginning of its answer.

        Raises:
            BackendUnavailableError: the server cannot be asked now.
            EngineError: it wants another key, or has no such model or endpoint.
            PromptError: it refuses this request.
        """
        try:
            self._http.connect()
            with self._lock:
                if self._is_closed:
                    raise ConnectionAbortedError("the request was given up")
                self._socket = self._http.sock
            self._http.sock.settimeout(self._address.max_silence)
            self._http.request(method, self._address.path + path, body, self._address.headers)
            self._response = self._http.getresponse()
            if self._response.status != http.client.OK:
                raise self._refused(self._response)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error

    def read_line(self) -> bytes:
        """The next line of the answer; empty at its end.

        Raises:
            BackendUnavailableError: the connection was lost, or the server says nothing.
            EngineError: the line is longer than any of vLLM's.
        """
        assert self._response is not None, "an answer follows what was sent"
        try:
            line = self._response.readline(MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(error) from error
        if len(line) >= MAX_LINE_BYTES:
            raise EngineError(f"{self._address.url} sends a line of more than {MAX_LINE_BYTES} bytes, as no vLLM does")
        return line

    def read_json(self) -> Any:
        """The whole answer.

        Raises:
            BackendUnavailableError: the connection was lost.
            EngineError: it is not JSON.
        """
        assert self._response is not None, "an answer follows what was sent"
        try:
            content = self._response.read(MAX_BODY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise EngineError(f"{self._address.url} does not answer as vLLM does ({error}); is it one?") from error

    def _lost(self, error: Exception) -> LostConnectionError:
        words = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            words = (
                f"it was silent for {self._http.sock.gettimeout() if self._http.sock else CONNECT_SECONDS:g} seconds"
            )
        return LostConnectionError(f"the vLLM server at {self._address.url} cannot be reached: {words}")

    def _refused(self, response: http.client.HTTPResponse) -> Exception:
        content = response.read(MAX_BODY_BYTES)
        return refusal(self._address.url, response.status, _message(content), response.headers.get("Retry-After"))


def refusal(url: str, status: int, message: str, retry_after: str | None = None) -> Exception:
    """The error for a status of the server that is not 200."""
    if status in (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE):
        return BackendUnavailableError(f"the vLLM server at {url} is busy: {message}", status, _seconds(retry_after))
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return EngineError(f"the vLLM server at {url} wants another API key: {message}; set api_key")
    if status == http.client.NOT_FOUND:
        return EngineError(f"the vLLM server at {url} has not what is asked for: {message}")
    if 400 <= status < 500:
        return PromptError(f"the vLLM server at {url} refuses the request: {message}")
    return LostConnectionError(f"the vLLM server at {url} failed with status {status}: {message}")


def _message(content: bytes) -> str:
    """What the server says is wrong."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:1000]
    return content[:200].decode(errors="replace") or "no details"


def _seconds(text: str | None) -> float | None:
    """A Retry-After header; dates are not read."""
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(text or "")
        return min(seconds, MAX_RETRY_SECONDS) if seconds >= 0 else None
    return None
