"""The KV cache of the ONNX Runtime decoder: one memory per layer, whose slots are bound to a session by address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.onnxruntime import run_errors
from hivtp.runtime.language.pages import Pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.engines.base import Device
    from hivtp.engines.manifest import LanguageManifest


def cache_names(manifest: LanguageManifest) -> list[str]:
    """What follows "past_key_values." and "present." in the decoder's names, in the order of the memory."""
    return [f"{layer}.{kind}" for layer in range(manifest.num_layers) for kind in ("key", "value")]


class KvCache:
    """Keys and values of several sequences, each in a slot: [slots, kv_heads, capacity, head_size] for each name.

    Args:
        manifest: sizes of the language model.
        num_slots, capacity: sequences, and positions of each.
        dtype: of keys and values, float32 or float16.
        device: "cuda" allocates on the first GPU.

    Raises:
        OutOfMemoryError: memory ran out.
    """

    def __init__(
        self, manifest: LanguageManifest, num_slots: int, capacity: int, dtype: np.dtype[Any], device: Device
    ) -> None:
        self.manifest = manifest
        self.num_slots = num_slots
        self.capacity = capacity
        self.dtype = dtype
        self.device = device
        self.names = cache_names(manifest)
        with run_errors("allocating the KV cache"):
            self._memories = [self._allocate() for _ in self.names]
        self._addresses = [
            memory.array.ctypes.data if isinstance(memory, Pages) else memory.data_ptr() for memory in self._memories
        ]

    def bind(self, binding: Any, start: int, stop: int) -> None:
        """Bind a range of slots to a session's past and present.

        Past and present are one memory. Grouped-query attention then writes new keys and values after the old ones
        instead of copying the past at every step.
        """
        shape = self._shape(stop - start)
        offset = start * int(np.prod(shape[1:])) * self.dtype.itemsize
        for name, address in zip(self.names, self._addresses, strict=True):
            place = (self.device, 0, self.dtype.type, shape, address + offset)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def grown(self, capacity: int, lengths: Sequence[int]) -> KvCache:
        """A larger copy.

        Args:
            capacity: positions of each slot.
            lengths: positions of each slot that are copied.
        """
        grown = KvCache(self.manifest, self.num_slots, capacity, self.dtype, self.device)
        for old, new in zip(self._memories, grown._memories, strict=True):
            # On a GPU through the host: a conversation rarely grows.
            source, target = (one.array if isinstance(one, Pages) else one.numpy() for one in (old, new))
            for slot, length in enumerate(lengths):
                target[slot, :, :length] = source[slot, :, :length]
            if not isinstance(new, Pages):
                new.update_inplace(target)
        return grown

    def release(self, slot: int, start: int) -> None:
        """Give back the memory of a slot's positions from `start` on. A GPU keeps it.

        Positions share pages with those before them, so a little more than the first `start` positions may stay.
        """
        position_bytes = self.manifest.head_size * self.dtype.itemsize
        head_bytes = self.capacity * position_bytes
        first_head = slot * self.manifest.num_kv_heads
        # A slot that is emptied is one piece in each memory.
        heads = range(first_head, first_head + (self.manifest.num_kv_heads if start else 1))
        size = head_bytes if start else head_bytes * self.manifest.num_kv_heads
        for memory in self._memories:
            if isinstance(memory, Pages):
                for head in heads:
                    memory.release(head * head_bytes + start * position_bytes, head * head_bytes + size)

    def _allocate(self) -> Any:
        shape = self._shape(self.num_slots)
        if self.device == "cpu":
            # Positions never reached cost nothing.
            return Pages(shape, self.dtype)
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, self.device, 0)

    def _shape(self, num_slots: int) -> list[int]:
        return [num_slots, self.manifest.num_kv_heads, self.capacity, self.manifest.head_size]


class BoundSlots:
    """A range of slots bound to the decoder, which runs them as one batch.

    Args:
        session: the decoder.
        cache: holds the slots.
        start, stop: which.
    """

    def __init__(self, session: Any, cache: KvCache, start: int, stop: int) -> None:
        self.session = session
        # The bindings hold addresses only, so the memory must live as long as they do.
        self._cache = cache
        self._binding = session.io_binding()
        self._positions = np.arange(cache.capacity)
        self._logits = np.empty((stop - start, 1, cache.manifest.vocab_size), cache.dtype)
        cache.bind(self._binding, start, stop)
        logits = self._logits
        self._binding.bind_output("logits", "cpu", 0, logits.dtype.type, list(logits.shape), logits.ctypes.data)

    def run(self, embeds: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.float32]:
        """Run the decoder on new positions.

        Args:
            embeds: [slots, num_new, hidden] float32; several slots take one position each, since the graph gives the
                logits of the last position only.
            lengths: positions of each slot, the new ones included. The mask is padded on the right: with padding on
                the left, grouped-query attention gives wrong tokens without an error.

        Returns:
            The logits [slots, vocab] float32 of the last position of each slot, valid until the next call.

        Raises:
            EngineError: onnxruntime failed.
            OutOfMemoryError: memory ran out.
        """
        assert max(lengths) <= self._cache.capacity, "a slot has room for what is appended to it"
        mask = (self._positions[: max(lengths)] < np.array(lengths)[:, None]).astype(np.int64)
        embeds = np.ascontiguousarray(embeds, self._cache.dtype)
        with run_errors("running the decoder"):
            for name, array in (("inputs_embeds", embeds), ("attention_mask", mask)):
                # By address: a binding that held the array would keep a long prompt in memory until its next run.
                self._binding.bind_input(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
            self.session.run_with_iobinding(self._binding)
        return self._logits[:, 0].astype(np.float32, copy=False)
