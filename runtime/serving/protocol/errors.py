"""What goes wrong with a request, as the status and the `error` object that OpenAI's clients understand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hivtp_ops.errors import (
    BackendUnavailableError,
    ContextLengthError,
    HivtpError,
    ImageError,
    OutOfMemoryError,
    PromptError,
    SettingsError,
)

# By status; clients show it, and few read it.
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """An error that a client is told.

    Attributes:
        status: of HTTP; 400 and above.
        message: what is wrong, and what to do.
        code: the kind of error, for programs.
        param: the field that it is about, as a path into the request.
        retry_after: seconds after which the same request may succeed; None where it will not.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Whether and when to ask again: OpenAI's clients would repeat whatever ends with 429 or 5xx."""
        if self.retry_after is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message, code, param)


def api_error(error: Exception) -> ApiError:
    """The error of a request, as its client is told: what it can act on in words, and all else without details."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return invalid(str(error), "messages", "context_length_exceeded")
        case ImageError():
            return invalid(str(error), "messages", "invalid_image")
        case PromptError():
            return invalid(str(error), "messages", "invalid_prompt")
        case SettingsError():
            return invalid(str(error))
        case OutOfMemoryError() | MemoryError():
            return ApiError(503, "memory ran out for this request; ask again later", "out_of_memory", retry_after=5)
        case BackendUnavailableError():
            # Its address is none of the client's business.
            message = "the language model of this server is busy or away; ask again later"
            return ApiError(error.status, message, "backend_unavailable", retry_after=error.retry_after or 5)
        case HivtpError() | Exception():
            return ApiError(500, "the server failed on this request; its log says more", "internal_error")
