"""What every call passes before an endpoint sees it: its number, the log, and who may come in."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hivtp.runtime.serving.http.asgi import Call
from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.settings import LOOPBACK_HOSTS
from hivtp.runtime.serving.telemetry.logs import log, where

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from hivtp.runtime.serving.http.asgi import App, Receive, Scope, Send
    from hivtp.runtime.serving.settings import ServerSettings

# What a balancer and a browser need without a key: nothing that tells of the model or of its users.
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDERS = ("/playground/",)
QUIET_PATHS = ("/health", "/ready", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Gate:
    """An ASGI app around another.

    Args:
        app: what calls are for.
        settings: who may come in.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._digests = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        notes: dict[str, Any] = scope.setdefault("hivtp.notes", {})
        call = Call(scope, receive, send, notes)
        notes["id"] = (
            given if _REQUEST_ID.fullmatch(given := call.headers.get("x-request-id", "")) else uuid.uuid4().hex
        )

        is_complete = False

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                notes["status"] = message["status"]
                extra = [(b"x-request-id", notes["id"].encode()), *HEADERS]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        call.send = send_noted
        try:
            self._check(call)
            await self._app(scope, receive, send_noted)
        except ApiError as error:
            await call.send_error(error)
        except Exception as error:
            log(logging.ERROR, "call_failed", id=notes["id"], error=where(error))
            # Whoever runs this app breaks an answer off that was only begun; its client must not take it for whole.
            if not is_complete:
                raise
        finally:
            self._log(scope, notes, time.perf_counter() - started)

    def _check(self, call: Call) -> None:
        """Let a call in, or not.

        Raises:
            ApiError: it has too many headers, asks for a host that this is not, or has no key.
        """
        headers = call.headers
        if sum(len(name) + len(value) + 4 for name, value in call.scope["headers"]) > self._settings.max_header_bytes:
            raise ApiError(431, "the headers are too large", "headers_too_large")
        if not self._is_host_known(headers.get("host", "")):
            message = "this server listens on this machine alone, and was asked for under another name (--allow-host)"
            raise ApiError(403, message, "host_not_allowed")
        path = call.scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or call.scope["method"] == "OPTIONS"
        if not self._digests:
            return
        key = self._key(headers)
        if key is not None:
            call.scope["hivtp.key"] = key
        elif not is_open:
            raise ApiError(
                401, "there is no such API key; send the header Authorization: Bearer KEY", "invalid_api_key"
            )

    def _is_host_known(self, host: str) -> bool:
        """On loopback: a web page of elsewhere whose name was made to lead here must not reach the model."""
        if not self._settings.is_on_loopback:
            return True
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in LOOPBACK_HOSTS or name in self._settings.allowed_hosts

    def _key(self, headers: dict[str, str]) -> str | None:
        """The key that a call names, if it is one of ours; the comparison takes the same time whatever it is."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        is_known = False
        for digest in self._digests:
            is_known |= hmac.compare_digest(given, digest)
        return key.strip() if is_known else None

    def _log(self, scope: Scope, notes: dict[str, Any], seconds: float) -> None:
        # A client that left before the answer began; the status is nginx's, and nobody got it.
        notes.setdefault("status", 499)
        if notes.get("code") == "client_gone":
            notes["status"] = 499
        level = logging.DEBUG if scope["path"] in QUIET_PATHS and notes["status"] < 500 else logging.INFO
        path = scope["path"] if len(scope["path"]) <= 200 else f"{scope['path'][:200]}..."
        log(level, "request", method=scope["method"], path=path, ms=round(seconds * 1e3, 1), **notes)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
