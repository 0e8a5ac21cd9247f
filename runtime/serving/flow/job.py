"""One request in the engine: a generation that tells the event loop how it goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hivtp.runtime.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.language.sampling import TokenLogprobs
    from hivtp.runtime.model import Model
    from hivtp.runtime.prepared_prompt import EncodedPrompt
    from hivtp_ops.errors import HivtpError


@dataclass(frozen=True)
class Begun:
    """The request has a slot."""


@dataclass(frozen=True)
class NewToken:
    """There is a further token.

    Attributes:
        text: that has become certain; often that of the token.
        logprobs: of the token, where they were asked for.
        at: when it was chosen, as `time.perf_counter` reads.
    """

    text: str
    logprobs: tuple[TokenLogprobs, ...]
    at: float


@dataclass(frozen=True)
class Finished:
    """The answer is whole.

    Attributes:
        answer: the whole of it.
        text: that had not been sent.
    """

    answer: Answer
    text: str


@dataclass(frozen=True)
class Failed:
    """The request got an error."""

    error: Exception


Event: TypeAlias = "Begun | NewToken | Finished | Failed"


class Job(Generation):
    """See Generation.

    Args:
        model: answers.
        prompt: the request, its images encoded; it is shorter than `max_positions`.
        salt: what separates the KV caches of those who must not share them.
        max_positions: of the prompt and the answer.
        emit: takes what happens, in the thread of the engine.

    Attributes:
        begun_at, first_token_at, ended_at: as `time.perf_counter` reads; None where it has not come to that.
    """

    def __init__(
        self,
        model: Model,
        prompt: EncodedPrompt,
        salt: bytes,
        max_positions: int,
        emit: Callable[[Job, Event], None],
    ) -> None:
        super().__init__(model, prompt)
        self.begun_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.num_new_tokens = 0
        self._max_new_tokens = min(super().max_new_tokens, max_positions - self.num_prompt_tokens)
        self._salt = salt
        self._emit = emit
        self._num_logprobs_given = 0

    @property
    def max_new_tokens(self) -> int:
        """See DecodeRequest.max_new_tokens."""
        return self._max_new_tokens

    @property
    def num_positions(self) -> int:
        """Of the prompt and the longest answer."""
        return self.num_prompt_tokens + self._max_new_tokens

    @property
    def keys(self) -> Sequence[Hashable] | None:
        """See DecodeRequest.keys. All that follow another first key are others, so the first one is salted."""
        first, *others = super().keys or ()
        return [(self._salt, first), *others]

    @property
    def salt(self) -> str | None:
        """See RemoteRequest.salt."""
        return self._salt.hex()

    def begin(self, num_cached: int) -> None:
        """See DecodeRequest.begin."""
        super().begin(num_cached)
        self.begun_at = time.perf_counter()
        self._emit(self, Begun())

    def push(self, token_id: int, milliseconds: float) -> bool:
        """See DecodeRequest.push."""
        goes_on = super().push(token_id, milliseconds)
        self.num_new_tokens += 1
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        new = tuple(self._logprobs[self._num_logprobs_given :])
        self._num_logprobs_given += len(new)
        self._emit(self, NewToken("".join(self.take_pieces()), new, now))
        if goes_on and self.num_new_tokens < self._max_new_tokens:
            return True
        self.finish()
        self.ended_at = time.perf_counter()
        self._emit(self, Finished(self.answer(), "".join(self.take_pieces())))
        return False

    def fail(self, error: HivtpError) -> None:
        """See DecodeRequest.fail."""
        super().fail(error)
        self.ended_at = time.perf_counter()
        self._emit(self, Failed(error))
