"""The scheduler: which sequence runs next, in which slot of the KV cache."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hivtp.runtime.attempt import attempt
from hivtp_ops.errors import HivtpError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.language.base import LanguageBackend, Slots


class DecodeRequest(Protocol):
    """A sequence that a scheduler decodes: its prompt, and what becomes of its tokens."""

    @property
    def embeds(self) -> NDArray[np.float32]:
        """The prompt, [length, hidden] float32, 0 < length < context_length."""

    @property
    def max_new_tokens(self) -> int:
        """At most this many tokens, 1 or more; fewer where the context ends first."""

    @property
    def keys(self) -> Sequence[Hashable] | None:
        """What stands at each position of the prompt: equal keys from the start on mean equal embeddings.

        None where the KV cache of this sequence must never serve another.
        """

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from the logits [vocab]; what this raises ends this sequence alone."""

    def push(self, token_id: int, milliseconds: float) -> bool:
        """Take a token; whether the sequence goes on after it.

        Args:
            token_id: what `choose` gave.
            milliseconds: of the runs that led to it: all chunks of the prompt for the first token, then the joint step.
        """

    def fail(self, error: HivtpError) -> None:
        """Take the error that ended the sequence."""


@dataclass(frozen=True)
class SchedulerOptions:
    """How a scheduler shares the decoder among sequences.

    Attributes:
        num_slots: sequences that run together.
        capacity: positions that each slot has room for at first.
        grows: more room is made where a sequence needs it; otherwise such a sequence is refused by `add`.
        chunk_size: while others decode, a prompt runs in chunks of this many positions; None runs it whole.
        steps_per_chunk: joint decode steps between two chunks; 0 runs prompts first.
        max_kv_bytes: a sequence waits until the KV cache of its prompt and longest answer fits; None is no bound.
        max_passed: sequences that fit may overtake one that does not this often; then it is first.
        keeps_slots: the KV cache of a finished sequence stays until its slot is needed, for one that begins alike.
    """

    num_slots: int
    capacity: int
    grows: bool = False
    chunk_size: int | None = None
    steps_per_chunk: int = 0
    max_kv_bytes: int | None = None
    max_passed: int = 16
    keeps_slots: bool = False

    def __post_init__(self) -> None:
        minima = {
            "num_slots": 1,
            "capacity": 2,
            "chunk_size": 1,
            "steps_per_chunk": 0,
            "max_kv_bytes": 1,
            "max_passed": 0,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise SettingsError(f"{name} must be at least {minimum}, not {value}")


@dataclass(eq=False)
class _Running:
    """A sequence in a slot."""

    request: DecodeRequest
    slot: int
    num_left: int
    num_reserved: int
    prompt_length: int
    keys: list[Hashable] | None
    token_id: int = -1
    prefill_ms: float = 0.0


@dataclass(eq=False)
class _Waiting:
    """A sequence that has no slot yet."""

    request: DecodeRequest
    num_positions: int
    num_passed: int = 0


class Scheduler:
    """Decodes sequences that come and go, each to the tokens that it gets alone. One thread at a time uses it.

    Args:
        language: the backend.
        options: how.

    Raises:
        OutOfMemoryError: there is no memory for the slots.
    """

    def __init__(self, language: LanguageBackend, options: SchedulerOptions) -> None:
        self._language = language
        self._options = options
        self._slots: Slots = language.open_slots(options.num_slots, min(options.capacity, language.context_length))
        self._waiting: deque[_Waiting] = deque()
        self._prefilling: deque[_Running] = deque()
        self._decoding: list[_Running] = []
        self._num_steps_left = 0
        # What each slot without a running sequence still holds, the least recently used first.
        self._kept: dict[int, list[Hashable]] = {}

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_reserved_bytes(self) -> int:
        """KV cache that the running sequences may come to need."""
        running = [*self._prefilling, *self._decoding]
        return sum(item.num_reserved for item in running) * self._language.kv_bytes_per_position

    def add(self, request: DecodeRequest) -> None:
        """Take a sequence into the queue.

        Raises:
            SettingsError: it can never fit into a slot or the KV budget.
        """
        length = len(request.embeds)
        num_positions = min(length + request.max_new_tokens, self._language.context_length)
        if num_positions > self._slots.capacity and not self._options.grows:
            raise SettingsError(
                f"the request takes up to {num_positions} positions, and a slot holds {self._slots.capacity}; shorten "
                "the prompt or ask for fewer tokens"
            )
        budget, num_bytes = self._options.max_kv_bytes, num_positions * self._language.kv_bytes_per_position
        if budget is not None and num_bytes > budget:
            raise SettingsError(
                f"the request takes up to {num_bytes} bytes of KV cache, and there are {budget}; shorten the prompt or "
                "ask for fewer tokens"
            )
        self._waiting.append(_Waiting(request, num_positions))

    def cancel(self, request: DecodeRequest) -> None:
        """Forget a sequence, wherever it is; one that is not there is ignored."""
        self._waiting = deque(item for item in self._waiting if item.request is not request)
        for item in [*self._prefilling, *self._decoding]:
            if item.request is request:
                self._leave(item)

    def step(self) -> bool:
        """Schedule one run of the decoder, run it, and hand out its tokens; whether there is more to do.

        A run is a chunk of one prompt, or one position of every sequence that decodes.
        """
        self._admit()
        if self._prefilling and (not self._decoding or self._num_steps_left <= 0):
            self._run_chunk(self._prefilling[0])
            self._num_steps_left = self._options.steps_per_chunk
        elif self._decoding:
            self._run_decode()
            self._num_steps_left -= 1
        return bool(self._waiting or self._prefilling or self._decoding)

    def run(self) -> None:
        """Decode all sequences to their ends."""
        while self.step():
            pass

    def _admit(self) -> None:
        """Give slots to waiting sequences, first come, first served, as far as slots and memory reach."""
        passed: list[_Waiting] = []
        while self._waiting and self.num_running < self._options.num_slots:
            item = self._waiting[0]
            if self._fits(item):
                self._waiting.popleft()
                for other in passed:
                    other.num_passed += 1
                self._start(item)
                continue
            if item.num_passed >= self._options.max_passed:
                break
            passed.append(self._waiting.popleft())
        self._waiting.extendleft(reversed(passed))

    def _fits(self, item: _Waiting) -> bool:
        budget = self._options.max_kv_bytes
        if budget is None:
            return True
        return self.num_reserved_bytes + item.num_positions * self._language.kv_bytes_per_position <= budget

    def _start(self, item: _Waiting) -> None:
        request = item.request
        keys = None if request.keys is None else list(request.keys)
        slot, num_shared = self._choose_slot(keys, len(request.embeds))
        self._kept.pop(slot, None)
        if item.num_positions > self._slots.capacity:
            # At least twice the room there was, so that a conversation rarely copies.
            capacity = max(item.num_positions, min(2 * self._slots.capacity, self._language.context_length))
            outcome = attempt(self._slots.reserve, capacity)
            if isinstance(outcome, HivtpError):
                request.fail(outcome)
                return
        self._slots.truncate(slot, num_shared)
        length = len(request.embeds)
        self._prefilling.append(
            _Running(request, slot, item.num_positions - length, item.num_positions, length - num_shared, keys)
        )

    def _choose_slot(self, keys: list[Hashable] | None, length: int) -> tuple[int, int]:
        """The slot for a sequence, and how many of its first positions that slot holds already."""
        used = {item.slot for item in [*self._prefilling, *self._decoding]}
        free = [slot for slot in range(self._slots.num_slots) if slot not in used]
        best, num_shared = -1, 0
        for slot, kept in self._kept.items() if keys is not None else ():
            num_common = num_equal(kept[: self._slots.length(slot)], keys or [])
            if num_common > num_shared:
                best, num_shared = slot, num_common
        if best >= 0:
            # The last position gives the first logits, so it is always computed.
            return best, min(num_shared, length - 1)
        # The lowest empty slot, so that joint steps span few; else the one that was not used for longest.
        empty = [slot for slot in free if slot not in self._kept]
        return (empty[0] if empty else next(iter(self._kept))), 0

    def _run_chunk(self, item: _Running) -> None:
        embeds = item.request.embeds
        start = self._slots.length(item.slot)
        size = self._options.chunk_size if self._decoding else None
        stop = len(embeds) if size is None else min(start + size, len(embeds))
        started = time.perf_counter()
        logits = attempt(self._slots.prefill, item.slot, embeds[start:stop], item.prompt_length)
        item.prefill_ms += (time.perf_counter() - started) * 1e3
        if isinstance(logits, HivtpError):
            self._leave(item, logits)
        elif stop == len(embeds):
            self._prefilling.popleft()
            self._decoding.append(item)
            self._decoding.sort(key=lambda other: other.slot)
            self._take(item, logits, item.prefill_ms)

    def _run_decode(self) -> None:
        items = list(self._decoding)
        started = time.perf_counter()
        embeds = self._language.embed([item.token_id for item in items])
        outputs = self._slots.step([item.slot for item in items], embeds)
        step_ms = (time.perf_counter() - started) * 1e3
        for item, output in zip(items, outputs, strict=True):
            # What was just computed is the token before the one that is chosen now.
            if item.keys is not None and not isinstance(output, HivtpError):
                item.keys.append(item.token_id)
            self._take(item, output, step_ms)

    def _take(self, item: _Running, output: NDArray[np.float32] | HivtpError, milliseconds: float) -> None:
        """Choose a sequence's next token from its logits and hand it out, or its error."""
        chosen = output if isinstance(output, HivtpError) else attempt(item.request.choose, output)
        goes_on: bool | HivtpError = False
        if not isinstance(chosen, HivtpError):
            item.token_id = chosen
            item.num_left -= 1
            goes_on = attempt(item.request.push, chosen, milliseconds)
        for error in (chosen, goes_on):
            if isinstance(error, HivtpError):
                self._leave(item, error)
                return
        # `push` may have cancelled this very sequence.
        if item in self._decoding and (not goes_on or item.num_left <= 0):
            self._leave(item)

    def _leave(self, item: _Running, error: HivtpError | None = None) -> None:
        """Take a sequence out of its slot."""
        if item in self._prefilling:
            self._prefilling.remove(item)
        if item in self._decoding:
            self._decoding.remove(item)
        if item.keys is not None and self._options.keeps_slots:
            # Also after an error: a run that fails leaves its slot as it was.
            self._kept[item.slot] = item.keys
        else:
            self._slots.truncate(item.slot, 0)
        if error is not None:
            item.request.fail(error)


def num_equal(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many keys two sequences have in common from their start."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
