"""Runs the app: sockets, signals, and an end that costs no answer which can still be given."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.app import create_app
from hivtp.runtime.serving.http.connection import connection_class
from hivtp.runtime.serving.telemetry.logs import log, log_to_stderr
from hivtp_ops.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from types import FrameType

    import uvicorn

    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.app import ServerApp
    from hivtp.runtime.serving.settings import ServerSettings

# After the drain, for the last bytes of answers and errors.
CLOSING_SECONDS = 10


def serve(model: Model, settings: ServerSettings) -> None:
    """Serve a model until SIGTERM or SIGINT; a second one ends it at once.

    Raises:
        MissingExtraError: a package of the extra `serve` is not installed.
        OutOfMemoryError: there is no memory for the KV cache.
        SettingsError: the address cannot be had.
    """
    with log_to_stderr(settings.log_format):
        app = create_app(model, settings)
        server = make_server(app, settings)
        try:
            server.run()
        except SystemExit as error:
            raise SettingsError(
                f"cannot listen on {settings.host}, port {settings.port}: it is taken, or not of this machine; choose "
                "another with --port or --host"
            ) from error


def make_server(app: ServerApp, settings: ServerSettings) -> uvicorn.Server:
    """A uvicorn server of an app.

    Raises:
        MissingExtraError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve") from error

    class Server(uvicorn.Server):
        """Lets answers end before it does."""

        _drain: asyncio.Task[None] | None = None

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                addresses = [socket.getsockname()[:2] for one in self.servers for socket in one.sockets]
                urls = [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
                log(logging.INFO, "listening", urls=urls, model=app.service.names[0])

        def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
            if self._drain is not None or self.should_exit:
                # Whoever asks twice does not want to wait.
                self.should_exit = self.force_exit = True
                return
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._begin_to_drain, signal.Signals(sig).name)

        def _begin_to_drain(self, name: str) -> None:
            self._drain = asyncio.ensure_future(self._end(name))

        async def _end(self, name: str) -> None:
            """Refuse what comes, wait for what was begun, and end the rest with an error."""
            service = app.service
            log(logging.INFO, "draining", signal=name, requests=service.admission.num_inside)
            if not await service.admission.close(settings.drain_seconds):
                log(logging.WARNING, "drain_deadline", requests=service.admission.num_inside)
                service.give_up()
                await service.admission.close(CLOSING_SECONDS / 2)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connection_class(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # An address that a client claims to forward for is not to be believed.
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return Server(config)
