"""The scheduler: which sequence runs next, in which slot of the KV cache."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivtp.runtime.attempt import attempt
from hivtp.runtime.language.slot_pool import SlotPool
from hivtp_ops.errors import HivtpError, PromptError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.language.base import DecodeRequest, LanguageBackend


# While nobody decodes, a chunk of a prompt is this many times as long: nobody waits for its end but those who would
# cancel it, and longer ones cost less.
LONG_CHUNK = 8


@dataclass(frozen=True)
class SchedulerOptions:
    """How a scheduler shares the decoder among sequences.

    Attributes:
        num_slots: sequences that run together.
        capacity: positions that each slot has room for at first.
        grows: more room is made where a sequence needs it; otherwise such a sequence is refused by `add`.
        chunk_size: while others decode, a prompt runs in chunks of this many positions, and otherwise in longer ones;
            None runs it whole.
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
        minima = {"num_slots": 1, "capacity": 2, "chunk_size": 1, "steps_per_chunk": 0}
        minima |= {"max_kv_bytes": 1, "max_passed": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is None and name in ("chunk_size", "max_kv_bytes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SettingsError(f"{name} must be a whole number, {minimum} or more, not {value!r}")


@dataclass(eq=False)
class _Sequence:
    """A sequence, from when it is added until it leaves.

    Attributes:
        request: whose it is.
        length: of the prompt.
        num_positions: that it takes up to its end.
        num_left: tokens that it may still get.
        keys: what stands at each position that is computed, and of the prompt; None where nobody may know.
        num_passed: sequences that overtook it.
        slot: where it runs.
        num_computed: positions of the prompt that the slot did not hold.
        token_id: the last token, which the next step computes.
        prefill_ms: of all chunks so far.
    """

    request: DecodeRequest
    length: int
    num_positions: int
    num_left: int
    keys: list[Hashable] | None
    num_passed: int = 0
    slot: int = -1
    num_computed: int = 0
    token_id: int = -1
    prefill_ms: float = 0.0


class Scheduler:
    """Decodes sequences that come and go, each to the tokens that it gets alone. One thread at a time uses it.

    Whatever one sequence raises, or makes the decoder raise, ends that sequence alone.

    Args:
        language: the backend.
        options: how.

    Raises:
        EngineError: the backend is closed.
        OutOfMemoryError: there is no memory for the slots.
    """

    def __init__(self, language: LanguageBackend, options: SchedulerOptions) -> None:
        self._language = language
        self._options = options
        self._slots = language.open_slots(options.num_slots, min(options.capacity, language.context_length))
        self._pool = SlotPool(self._slots, keeps=options.keeps_slots)
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: deque[_Sequence] = deque()
        self._decoding: list[_Sequence] = []
        self._num_steps_left = 0

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
        """KV cache that the running sequences may come to need, and that free slots keep."""
        return (self._num_running_positions + self._pool.num_kept_positions) * self._language.kv_bytes_per_position

    def add(self, request: DecodeRequest) -> None:
        """Take a sequence into the queue.

        Raises:
            PromptError: the prompt does not fit the context.
            SettingsError: it can never fit into a slot or the KV budget.
        """
        length, keys = len(request.embeds), request.keys
        context_length = self._language.context_length
        if not 0 < length < context_length:
            # The KV cache is written by address, so no position may lie outside of it.
            raise PromptError(f"the prompt takes {length} positions, and the context holds {context_length}")
        num_positions = min(length + request.max_new_tokens, context_length)
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
        keys = None if keys is None else list(keys)
        self._waiting.append(_Sequence(request, length, num_positions, num_positions - length, keys))

    def cancel(self, request: DecodeRequest) -> None:
        """Forget a sequence, wherever it is; one that is not there is ignored."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request is not request)
        for sequence in [*self._prefilling, *self._decoding]:
            if sequence.request is request:
                self._leave(sequence)

    def forget(self) -> None:
        """Empty the slots that are kept for sequences to come; on the CPU their memory goes back to the system."""
        self._pool.forget_all()

    def step(self) -> bool:
        """Schedule one run of the decoder, run it, and hand out its tokens; whether there is more to do.

        A run is a chunk of one prompt, or one position of every sequence that decodes.
        """
        self._admit()
        if self._prefilling and (not self._decoding or self._num_steps_left <= 0):
            self._run_chunk(self._prefilling[0])
            self._num_steps_left = self._options.steps_per_chunk
        elif self._decoding:
            self._run_decode(list(self._decoding))
            self._num_steps_left -= 1
        return bool(self._waiting or self._prefilling or self._decoding)

    def run(self) -> None:
        """Decode all sequences to their ends."""
        while self.step():
            pass

    def _admit(self) -> None:
        """Give slots to waiting sequences, first come, first served, as far as slots and memory reach."""
        passed: list[_Sequence] = []
        while self._waiting and self._pool.num_free and not self._must_wait(passed):
            sequence = self._waiting.popleft()
            if self._is_over_budget(self._num_running_positions + sequence.num_positions):
                passed.append(sequence)
                continue
            for other in passed:
                other.num_passed += 1
            self._start(sequence)
        self._waiting.extendleft(reversed(passed))

    def _must_wait(self, passed: Sequence[_Sequence]) -> bool:
        """Whether one of these was overtaken as often as it may be."""
        return any(sequence.num_passed >= self._options.max_passed for sequence in passed)

    def _start(self, sequence: _Sequence) -> None:
        if sequence.num_positions > self._slots.capacity:
            # At least twice the room there was, so that a conversation rarely copies.
            capacity = max(sequence.num_positions, min(2 * self._slots.capacity, self._language.context_length))
            result = attempt(self._slots.reserve, capacity)
            if isinstance(result, HivtpError):
                attempt(sequence.request.fail, result)
                return
        sequence.slot = self._pool.take(sequence.keys, sequence.length)
        num_cached = self._slots.length(sequence.slot)
        sequence.num_computed = sequence.length - num_cached
        self._prefilling.append(sequence)
        attempt(sequence.request.begin, num_cached)
        while self._is_over_budget(self._num_running_positions + self._pool.num_kept_positions):
            self._pool.forget_oldest()

    @property
    def _num_running_positions(self) -> int:
        return sum(sequence.num_positions for sequence in [*self._prefilling, *self._decoding])

    def _is_over_budget(self, num_positions: int) -> bool:
        budget = self._options.max_kv_bytes
        return budget is not None and num_positions * self._language.kv_bytes_per_position > budget

    def _run_chunk(self, sequence: _Sequence) -> None:
        started = time.perf_counter()
        logits = attempt(self._prefill, sequence)
        sequence.prefill_ms += (time.perf_counter() - started) * 1e3
        if isinstance(logits, HivtpError):
            self._leave(sequence, logits)
        elif self._slots.length(sequence.slot) == sequence.length:
            self._prefilling.popleft()
            self._decoding.append(sequence)
            self._decoding.sort(key=lambda other: other.slot)
            self._hand_out(sequence, logits, sequence.prefill_ms)

    def _prefill(self, sequence: _Sequence) -> NDArray[np.float32]:
        """Compute a chunk of what is left of a prompt."""
        start = self._slots.length(sequence.slot)
        size = self._options.chunk_size
        if size is not None and not self._decoding:
            size *= LONG_CHUNK
        chunk = sequence.request.embeds[start : sequence.length if size is None else start + size]
        return self._slots.prefill(sequence.slot, chunk, sequence.num_computed)

    def _run_decode(self, sequences: Sequence[_Sequence]) -> None:
        """Decode one position of each: together, or one by one where that fails, since one may be the cause."""
        started = time.perf_counter()
        logits = attempt(self._decode, sequences)
        step_ms = (time.perf_counter() - started) * 1e3
        if not isinstance(logits, HivtpError):
            for sequence, chosen_from in zip(sequences, logits, strict=True):
                if sequence.keys is not None:
                    sequence.keys.append(sequence.token_id)
                self._hand_out(sequence, chosen_from, step_ms)
        elif len(sequences) == 1:
            self._leave(sequences[0], logits)
        else:
            for sequence in sequences:
                if sequence in self._decoding:
                    self._run_decode([sequence])

    def _decode(self, sequences: Sequence[_Sequence]) -> NDArray[np.float32]:
        embeds = self._language.embed([sequence.token_id for sequence in sequences])
        return self._slots.step([sequence.slot for sequence in sequences], embeds)

    def _hand_out(self, sequence: _Sequence, logits: NDArray[np.float32], milliseconds: float) -> None:
        """Choose a sequence's next token from its logits, and hand it out."""
        if sequence not in self._decoding:
            # `push` of another sequence has cancelled it.
            return
        goes_on = attempt(self._choose_and_push, sequence, logits, milliseconds)
        # `push` may have cancelled this very sequence.
        if sequence in self._decoding and goes_on is not True:
            self._leave(sequence, goes_on if isinstance(goes_on, HivtpError) else None)

    @staticmethod
    def _choose_and_push(sequence: _Sequence, logits: NDArray[np.float32], milliseconds: float) -> bool:
        sequence.token_id = sequence.request.choose(logits)
        sequence.num_left -= 1
        return bool(sequence.request.push(sequence.token_id, milliseconds)) and sequence.num_left > 0

    def _leave(self, sequence: _Sequence, error: HivtpError | None = None) -> None:
        """Take a running sequence out of its slot."""
        (self._decoding if sequence in self._decoding else self._prefilling).remove(sequence)
        # Also after an error: a run that fails leaves its slot as it was.
        self._pool.give_back(sequence.slot, sequence.keys)
        if error is not None:
            attempt(sequence.request.fail, error)
