"""A gateway: takes calls of HTTP in, hands them to replicas, and says so where one ends in the middle of an answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.ray.calls import Head, HttpCall
from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.protocol.sse import DONE, event, to_json
from hivtp.runtime.serving.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from hivtp.runtime.integrations.ray.settings import RaySettings

# Tries of a call that nothing was answered to.
MAX_TRIES = 3
RETRY_SECONDS = 2.0


class Gateway:
    """See `create_application`.

    Args:
        settings: what a call may hold, and which header names its session.
        replicas: a handle of Ray.
    """

    def __init__(self, settings: RaySettings, replicas: Any) -> None:
        self._settings = settings
        self._max_body_bytes = settings.server_settings.max_body_bytes
        self._replicas = replicas

    async def __call__(self, request: Any) -> Any:
        """Answer a call; Ray gives a request of Starlette, and takes a response of it."""
        from starlette.responses import Response, StreamingResponse

        try:
            call = await self._read(request)
            head, parts = await self._begin(call)
        except ApiError as error:
            return Response(to_json(error.body), error.status, error.headers, "application/json")
        response = StreamingResponse(parts, head.status)
        response.raw_headers = list(head.headers)
        return response

    async def _read(self, request: Any) -> HttpCall:
        """The whole call.

        Raises:
            ApiError: it is too large.
        """
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the request has more than {self._max_body_bytes} bytes", "body_too_large")
        scope = request.scope
        client = scope.get("client")
        return HttpCall(
            scope["method"],
            scope["path"],
            scope["query_string"],
            tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            bytes(body),
            None if client is None else (client[0], client[1]),
        )

    async def _begin(self, call: HttpCall) -> tuple[Head, AsyncIterator[bytes]]:
        """Find a replica that begins to answer.

        Raises:
            ApiError: none does.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        wanted = self._settings.session_header.lower().encode()
        session = next((value.decode("latin-1") for name, value in call.headers if name == wanted), "")
        for _ in range(MAX_TRIES):
            answer = self._replicas.options(stream=True, session_id=session).call.remote(call)
            try:
                head = await anext(aiter(answer))
            except RayActorError:
                # It ended before it said anything, so that another may answer.
                log(logging.WARNING, "replica_lost", answered=False)
                continue
            except BackPressureError as error:
                message = "too many requests are waiting; ask again later"
                raise ApiError(429, message, "queue_full", retry_after=RETRY_SECONDS) from error
            except DeploymentUnavailableError as error:
                raise _away() from error
            return head, _parts(answer, head)
        raise _away()


async def _parts(answer: Any, head: Head) -> AsyncGenerator[bytes]:
    """The body, and an error in a stream whose replica ends; whoever stops iterating frees the replica."""
    from ray.exceptions import RayActorError

    is_whole = False
    try:
        async for part in answer:
            yield part
        is_whole = True
    except RayActorError:
        log(logging.WARNING, "replica_lost", answered=True)
        is_whole = True
        if not head.is_stream:
            # A body that breaks off is an error of the connection.
            raise
        yield event(_away().body) + DONE
    finally:
        if not is_whole:
            answer.cancel()


def _away() -> ApiError:
    message = "the replica that had this request has ended; ask again"
    return ApiError(503, message, "replica_lost", retry_after=RETRY_SECONDS)
