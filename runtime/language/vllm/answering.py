"""One request while the server answers it, in a thread of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeAlias

from hivtp.runtime.attempt import attempt
from hivtp.runtime.language.vllm.connection import Connection, LostConnectionError
from hivtp.runtime.language.vllm.events import NewTokens, PromptRead, read_stream
from hivtp_ops.errors import HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hivtp.runtime.language.remote import RemoteRequest
    from hivtp.runtime.language.vllm.connection import ServerAddress
    from hivtp.runtime.language.vllm.events import Ended

# Before the second try, then twice as long each time.
RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Happened:
    """Something came from the server, or went wrong.

    Attributes:
        answering: whose request it is of.
        event: what it is.
        at: when, as `time.perf_counter` reads.
    """

    answering: Answering
    event: NewTokens | Ended | HivtpError
    at: float


Emit: TypeAlias = "Callable[[Happened], object]"


class Answering:
    """Sends a request and reads its answer.

    Args:
        request: what is asked.
        address: of the server.
        make_body: what to send; called in the thread, since it takes a while where there are images.
        image_token_id: the placeholder of an image in `request.token_ids`.
        max_retries: how often to send it again where no token came.
        emit: takes what happens, in the thread. After Ended or an error nothing more does.
    """

    def __init__(
        self,
        request: RemoteRequest,
        address: ServerAddress,
        make_body: Callable[[RemoteRequest], bytes],
        image_token_id: int,
        max_retries: int,
        emit: Emit,
    ) -> None:
        self.request = request
        self._address = address
        self._make_body = make_body
        self._image_token_id = image_token_id
        self._max_retries = max_retries
        self._emit = emit
        self._connection: Connection | None = None
        self._has_token = False
        self._is_given_up = Event()
        self._thread = Thread(target=self._run, name="hivtp-vllm", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def give_up(self) -> None:
        """Stop, and let the server stop; what happens from now on is nobody's business."""
        self._is_given_up.set()
        if (connection := self._connection) is not None:
            connection.close()

    def _run(self) -> None:
        error = attempt(self._ask_until_answered)
        if isinstance(error, HivtpError):
            self._note(error)

    def _ask_until_answered(self) -> None:
        body = self._make_body(self.request)
        for num_tries in range(self._max_retries + 1):
            try:
                return self._ask(body)
            except LostConnectionError:
                if self._has_token or num_tries == self._max_retries:
                    raise
                if self._is_given_up.wait(RETRY_SECONDS * 2**num_tries):
                    return None
        return None

    def _ask(self, body: bytes) -> None:
        with Connection(self._address) as connection:
            self._connection = connection
            if self._is_given_up.is_set():
                return
            connection.send("POST", "/v1/chat/completions", body)
            for event in read_stream(connection, self._address.url):
                if isinstance(event, PromptRead):
                    self._check_prompt(event.token_ids)
                    continue
                self._has_token |= isinstance(event, NewTokens)
                self._note(event)

    def _check_prompt(self, found: Sequence[int]) -> None:
        """Refuse to take an answer to another prompt than the bundle's template writes."""
        expected = list(expanded(self.request, self._image_token_id))
        if list(found) == expected:
            return
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
        raise PromptError(
            f"the vLLM server at {self._address.url} reads this prompt as {len(found)} tokens, and the bundle as "
            f"{len(expected)}; they differ from token {place} on. The server must have the tokenizer and the chat "
            "template of the bundle's checkpoint; and neither control tokens such as </s> in the words nor images "
            "between them can be sent to vLLM"
        )

    def _note(self, event: NewTokens | Ended | HivtpError) -> None:
        if not self._is_given_up.is_set():
            self._emit(Happened(self, event, time.perf_counter()))


def expanded(request: RemoteRequest, image_token_id: int) -> list[int]:
    """The token ids of a prompt with a placeholder for each token of its images."""
    sizes = iter([len(part) for turn in request.turns for part in turn.parts if not isinstance(part, str)])
    found: list[int] = []
    for token_id in request.token_ids:
        found += [token_id] * (next(sizes) if token_id == image_token_id else 1)
    return found
