"""What a language model in another server is given, and what both kinds of schedulers offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

# A protocol's bases are needed when it is made.
from hivtp.runtime.language.base import DecodeRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.language.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Turn:
    """A message of a conversation, for a server that writes the prompt itself.

    Attributes:
        role: "system", "user" or "assistant".
        parts: words, and images as their embeddings [num_tokens, hidden] float32, in order.
    """

    role: str
    parts: tuple[str | NDArray[np.float32], ...]


class RemoteRequest(DecodeRequest, Protocol):
    """A sequence that another server decodes, and samples, too: `embeds` and `choose` are not used."""

    @property
    def turns(self) -> Sequence[Turn]:
        """The conversation."""

    @property
    def token_ids(self) -> Sequence[int]:
        """What the server must make of `turns`, one placeholder for each image."""

    @property
    def num_prompt_tokens(self) -> int:
        """Positions of the prompt, those of its images included."""

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen; resolved."""

    @property
    def salt(self) -> str | None:
        """What separates the prefix caches of those who must not share them."""

    def note_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Take the log probabilities of the token that is pushed next, where they were asked for."""


class RequestScheduler(Protocol):
    """Decodes sequences that come and go, here or elsewhere. One thread at a time uses it."""

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun."""

    @property
    def num_running(self) -> int:
        """Sequences that have begun."""

    def add(self, request: RemoteRequest) -> None:
        """Take a sequence into the queue.

        Raises:
            PromptError: the prompt does not fit the context.
            SettingsError: it can never be decoded here.
        """

    def cancel(self, request: DecodeRequest) -> None:
        """Forget a sequence, wherever it is; one that is not there is ignored."""

    def step(self) -> bool:
        """Do a little, and hand out what came of it; whether there is more to do."""

    def run(self) -> None:
        """Decode all sequences to their ends."""

    def forget(self) -> None:
        """Give back what is kept of sequences that have ended."""


class RemoteBackend(ABC):
    """A language model that runs in another server, which writes prompts, holds the KV cache and samples."""

    context_length: int

    @property
    @abstractmethod
    def description(self) -> str:
        """What computes the answers, for people."""

    @abstractmethod
    def open_scheduler(self, num_slots: int) -> RequestScheduler:
        """Takes instances of RemoteRequest; at most this many are with the server at once."""

    @abstractmethod
    def check(self, ask: Callable[[], object], *, counts_vary: bool) -> None:
        """Find out, before anybody asks, whether the server can answer.

        Args:
            ask: puts a short question about an image to it, and raises what that raises.
            counts_vary: one image has more tokens than another.

        Raises:
            EngineError: it cannot, and what it lacks.
        """

    @abstractmethod
    def close(self) -> None:
        """Ask nothing more."""
