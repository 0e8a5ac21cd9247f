"""uvicorn's HTTP/1.1 connection with the bounds that it lacks: on endless headers, and on bodies of refused calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.protocol.sse import to_json
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    import asyncio

    from hivtp.runtime.serving.settings import ServerSettings

# A client that was refused while it still sends may read the answer for this long.
LINGER_SECONDS = 5.0


def connection_class(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The class of connections.

    Args:
        settings: how long a client may take for its headers.

    Raises:
        MissingExtraError: uvicorn is not installed.
    """
    try:
        import h11
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve") from error

    class Connection(H11Protocol):
        """See the module."""

        _patience: asyncio.TimerHandle | None = None
        _has_begun = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._has_begun = True
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                # The next headers have begun, maybe; uvicorn's own timer ended with the first byte.
                self._wait_for_headers()
            else:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
                self.loop.call_later(LINGER_SECONDS, self._close_if_sending, self.cycle)

        def send_400_response(self, msg: str) -> None:
            self._close_with(ApiError(400, msg, "invalid_http"))

        def _close_if_sending(self, cycle: object) -> None:
            if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
                self.transport.close()

        def _wait_for_headers(self) -> None:
            if self._patience is None:
                self._patience = self.loop.call_later(settings.header_seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _give_up(self) -> None:
            self._patience = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                message = f"the headers did not come within {settings.header_seconds:g} seconds"
                self._close_with(ApiError(408, message, "request_timeout"))

        def _close_with(self, error: ApiError) -> None:
            """Answer what is not a request, and close."""
            # A client that has sent nothing asks for nothing.
            if self._has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = to_json(error.body)
                reason = {400: "Bad Request", 408: "Request Timeout"}[error.status]
                head = f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n"
                self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    return Connection
