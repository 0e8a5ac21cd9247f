"""The server as an ASGI app, which is a value: for uvicorn, Ray Serve and tests alike."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.chat import ChatEndpoint
from hivtp.runtime.serving.endpoints import Endpoints
from hivtp.runtime.serving.flow.service import Service
from hivtp.runtime.serving.http.asgi import Endpoint
from hivtp.runtime.serving.http.gate import Gate
from hivtp.runtime.serving.protocol.errors import ApiError, api_error
from hivtp.runtime.serving.settings import ServerSettings
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.http.asgi import App, Call, Receive, Scope, Send

# The page at `/` is `index.html` of this folder; what it needs beside it is served below /playground/. It is allowed
# what stands here: its own scripts and styles, and images that it was given. Nothing in it may read text as HTML.
PLAYGROUND = Path(__file__).with_name("playground")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


class ServerApp:
    """An ASGI app.

    Args:
        app: what answers.
        service: what does the work.

    Attributes:
        service: see above; whoever runs the app drains and stops through it.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._app(scope, receive, send)


def create_app(model: Model, settings: ServerSettings | None = None) -> ServerApp:
    """The server of a model.

    Args:
        model: of a loaded pipeline (`Pipeline.load(bundle).model`); whoever loaded it closes it.
        settings: how it behaves.

    Raises:
        MissingExtraError: a package of the extra `serve` is not installed.
        OutOfMemoryError: there is no memory for the KV cache.
        SettingsError: not even a short request would fit into it.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise MissingExtraError("starlette", "serve") from error

    settings = settings or ServerSettings()
    service = Service(model, settings)
    small, chat = Endpoints(service), ChatEndpoint(service)
    files = StaticFiles(directory=PLAYGROUND)
    routes = [
        Route("/v1/chat/completions", Endpoint(chat.answer), methods=["POST"]),
        Route("/v1/completions", Endpoint(small.completions), methods=["POST"]),
        Route("/v1/models", Endpoint(small.models), methods=["GET"]),
        Route("/v1/models/{name:path}", Endpoint(small.model), methods=["GET"]),
        Route("/tokenize", Endpoint(small.tokenize), methods=["POST"]),
        Route("/health", Endpoint(small.health), methods=["GET"]),
        Route("/ready", Endpoint(small.ready), methods=["GET"]),
        Route("/metrics", Endpoint(small.metrics), methods=["GET"]),
        Route("/version", Endpoint(small.version), methods=["GET"]),
        Route("/", _Page(files, "index.html"), methods=["GET"]),
        Mount("/playground", _Page(files)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # An answer that is an ASGI app is all that Starlette wants of them.
    handlers: dict[Any, Any] = {HTTPException: _refused, Exception: _failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    gate: App = Gate(app, settings)
    if settings.allowed_origins:
        gate = CORSMiddleware(
            gate,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "hivtp-ignored", "retry-after"],
        )
    return ServerApp(gate, service)


class _Page:
    """Files of the playground.

    Args:
        files: serves them.
        name: of one that is served whatever the path is; None takes the path.
    """

    def __init__(self, files: App, name: str | None = None) -> None:
        self._files = files
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if self._name is not None:
            scope = {**scope, "path": f"/{self._name}", "root_path": ""}

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", PAGE_POLICY.encode()), (b"cache-control", b"no-cache")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self._files(scope, receive, send_guarded)


def _refused(_request: Any, error: Any) -> Endpoint:
    """What Starlette itself refuses: paths that there are not, and methods that they do not take."""
    words = {404: "there is no such path; this server has /v1/chat/completions and /v1/models", 405: "no such method"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")

    async def answer(call: Call) -> None:
        found = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code)
        call.notes["code"] = code
        await call.send_json(found.body, found.status, {**found.headers, **(error.headers or {})})

    return Endpoint(answer)


def _failed(_request: Any, error: Exception) -> Endpoint:
    async def answer(call: Call) -> None:
        await call.send_error(api_error(error))

    return Endpoint(answer)
