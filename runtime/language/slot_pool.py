"""Which slots of a KV cache are free, and what they still hold for a sequence that begins alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from hivtp.runtime.language.base import Slots


class SlotPool:
    """Gives slots to sequences, and takes them back.

    Args:
        slots: all of them empty.
        keeps: a slot keeps what it holds until it is needed; otherwise it is emptied at once.
    """

    def __init__(self, slots: Slots, *, keeps: bool) -> None:
        self._slots = slots
        self._keeps = keeps
        self._empty = set(range(slots.num_slots))
        # What stands in each slot that is free and not empty; the one that was not used for longest comes first.
        self._kept: dict[int, Sequence[Hashable]] = {}

    @property
    def num_free(self) -> int:
        """Slots without a sequence."""
        return len(self._empty) + len(self._kept)

    @property
    def num_kept_positions(self) -> int:
        """Positions that the free slots hold."""
        return sum(self._slots.length(slot) for slot in self._kept)

    def take(self, keys: Sequence[Hashable] | None, length: int) -> int:
        """Give a free slot to a sequence; the slot holds the first positions of it already, or nothing.

        Args:
            keys: what stands at each position of the sequence; see DecodeRequest.keys.
            length: of the sequence. The last position gives the first logits, so it is always computed.
        """
        shared = {slot: self._num_shared(slot, keys) for slot in self._kept}
        best = max(shared, key=shared.__getitem__, default=None)
        # A slot of which less than half would be of use is left to the sequences that it serves.
        if best is not None and 2 * shared[best] >= self._slots.length(best):
            slot = best
        elif self._empty:
            # The lowest one, so that joint steps span few slots.
            slot = min(self._empty)
        else:
            slot = next(iter(self._kept))
        self._empty.discard(slot)
        self._kept.pop(slot, None)
        self._slots.truncate(slot, min(shared.get(slot, 0), length - 1))
        return slot

    def give_back(self, slot: int, keys: Sequence[Hashable] | None) -> None:
        """Free a slot.

        Args:
            slot: what `take` gave.
            keys: what stands at each position of the slot; None where that must serve no other sequence.
        """
        if self._keeps and keys is not None and self._slots.length(slot) > 0:
            self._kept[slot] = keys
        else:
            self._forget(slot)

    def forget_oldest(self) -> None:
        """Empty the free slot that was not used for longest; at least one holds something."""
        slot = next(iter(self._kept))
        del self._kept[slot]
        self._forget(slot)

    def forget_all(self) -> None:
        """Empty all free slots."""
        while self._kept:
            self.forget_oldest()

    def _forget(self, slot: int) -> None:
        self._slots.truncate(slot, 0)
        self._empty.add(slot)

    def _num_shared(self, slot: int, keys: Sequence[Hashable] | None) -> int:
        """How many of its first positions a sequence has in common with a slot."""
        keys = keys or ()
        # A slot may have forgotten positions at its end.
        kept = self._kept[slot][: self._slots.length(slot)]
        pairs = zip(kept, keys, strict=False)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(kept), len(keys)))
