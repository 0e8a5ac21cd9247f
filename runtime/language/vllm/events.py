"""What a server of vLLM streams, line by line, as events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from hivtp.runtime.language.sampling import TokenLogprobs
from hivtp.runtime.language.vllm.connection import LostConnectionError, refusal
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hivtp.runtime.language.vllm.connection import Connection

DONE = b"[DONE]"
# How tokens are called where their ids are asked for.
TOKEN_PREFIX = "token_id:"


@dataclass(frozen=True)
class PromptRead:
    """The server has read the prompt; `token_ids` is what it made of it, images in their full length."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class NewTokens:
    """There are further tokens; `logprobs` has one item for each, or none where they were not asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Ended:
    """The answer is whole; `reason` is the server's."""

    reason: str


StreamEvent: TypeAlias = "PromptRead | NewTokens | Ended"


def read_stream(connection: Connection, url: str) -> Iterator[StreamEvent]:
    """The events of a streamed chat, which end with Ended.

    Args:
        connection: whose answer has begun.
        url: of the server, for messages.

    Raises:
        BackendUnavailableError: the server is busy, or the connection ended before the answer did.
        EngineError: the server says something that vLLM does not say.
        PromptError: it refuses the request.
    """
    reason = None
    while line := connection.read_line():
        if not line.startswith(b"data:"):
            # Comments, and the lines between events.
            continue
        data = line[5:].strip()
        if data == DONE:
            if reason is None:
                raise LostConnectionError(f"the vLLM server at {url} ended an answer without a reason")
            yield Ended(reason)
            return
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                error = chunk["error"]
                raise refusal(url, int(error.get("code") or 500), str(error.get("message"))[:1000])
            yield from _events(chunk)
            reason = next((str(choice["finish_reason"]) for choice in _ended(chunk)), reason)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise EngineError(
                f"{url} streams something that vLLM 0.32 and 0.33 do not ({type(error).__name__}: {error})"
            ) from error
    raise LostConnectionError(f"the vLLM server at {url} ended the connection before the answer was whole")


def _events(chunk: Any) -> Iterator[StreamEvent]:
    if (prompt := chunk.get("prompt_token_ids")) is not None:
        yield PromptRead(_ids(prompt))
    for choice in chunk.get("choices", ()):
        token_ids = _ids(choice.get("token_ids") or ())
        if token_ids:
            found = (choice.get("logprobs") or {}).get("content") or ()
            logprobs = tuple(map(_logprobs, found))
            if logprobs and [item.token_id for item in logprobs] != list(token_ids):
                raise ValueError("log probabilities are of other tokens")
            yield NewTokens(token_ids, logprobs)


def _ended(chunk: Any) -> list[Any]:
    return [choice for choice in chunk.get("choices", ()) if choice.get("finish_reason") is not None]


def _ids(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("token ids are no whole numbers")
    return tuple(values)


def _logprobs(item: Any) -> TokenLogprobs:
    top = tuple((_token_id(other["token"]), float(other["logprob"])) for other in item.get("top_logprobs") or ())
    return TokenLogprobs(_token_id(item["token"]), float(item["logprob"]), top)


def _token_id(token: str) -> int:
    return int(token.removeprefix(TOKEN_PREFIX))
