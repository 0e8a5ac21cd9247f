"""The bundle's decoder in ONNX Runtime, on the CPU or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.engines.onnxruntime_cuda import open_cuda_session
from hivtp.engines.signature import check_session, decoder_tensors
from hivtp.runtime.language.base import closed_error, embedding_table, kv_bytes_per_position
from hivtp.runtime.language.kv_cache import BoundSlots, KvCache
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.engines.base import Device, EngineSettings
    from hivtp.engines.manifest import LanguageManifest

# Prompts of at least this many tokens use the prefill decoder. With fewer, int4 in blocks of 128 was as fast in one
# product of 4096 x 4096, and int4 in blocks of 32 up to 6 tokens.
MIN_PREFILL_TOKENS = 16
# Ranges of slots that stay bound. A batch whose requests end one by one runs through as many ranges as it has slots.
NUM_BOUND_RANGES = 16


class _Loaded(NamedTuple):
    """What a decoder takes memory for: the table of its embeddings, and its sessions."""

    embeddings: NDArray[np.floating]
    decode: Any
    prefill: Any


class OnnxRuntimeLanguage:
    """A decoder written by ONNX Runtime GenAI's model builder, driven through IOBinding.

    On a GPU the weights and the KV cache stay in its memory; embeddings go up and logits come down. It has not run on
    one yet.

    Args:
        folder: the bundle's folder, which the manifest's paths are relative to.
        manifest: describes the decoder and its embeddings.
        settings: how to run it.
        device: "cpu" or "cuda".

    Raises:
        BundleError: the embeddings are damaged.
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load the decoder, or not on that device.
        OutOfMemoryError: the decoder does not fit into the memory of the device.
    """

    def __init__(
        self, folder: Path, manifest: LanguageManifest, settings: EngineSettings, device: Device = "cpu"
    ) -> None:
        decoder = manifest.decoder
        assert decoder is not None, "the factory refuses a bundle without a decoder"
        if device == "cuda" and decoder.dtype != "float16":
            raise EngineError(
                f"the decoder of {folder} is {decoder.precision}, made for the CPU: onnxruntime's attention on a GPU "
                "computes in float16 alone; export the bundle with --language-precision fp16 or int4-fp16, or run the "
                "decoder on the CPU"
            )
        self.context_length = manifest.context_length
        self.manifest = manifest
        self.device = device
        prefill_note = "" if decoder.prefill_precision is None else f", prompts in {decoder.prefill_precision}"
        where = " on a GPU" if device == "cuda" else ""
        self.description = f"{decoder.precision} decoder in onnxruntime{where}{prefill_note}"
        self.dtype: np.dtype[Any] = np.dtype(decoder.dtype)
        embeddings = embedding_table(folder / decoder.embeddings, (manifest.vocab_size, manifest.hidden_size))
        decode = prefill = self._open(folder / decoder.file, settings, stops_spinning=False)
        if decoder.prefill_file is not None:
            # The decode steps follow at once in the other decoder, whose threads these would spin against.
            prefill = self._open(folder / decoder.prefill_file, settings, stops_spinning=True)
        self._loaded: _Loaded | None = _Loaded(embeddings, decode, prefill)

    @property
    def kv_bytes_per_position(self) -> int:
        """See LanguageBackend.kv_bytes_per_position."""
        return kv_bytes_per_position(self.manifest, self.dtype.itemsize)

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See LanguageBackend.embed."""
        return self._open_parts.embeddings[np.asarray(token_ids, np.int64)].astype(np.float32, copy=False)

    def open_slots(self, num_slots: int, capacity: int) -> OnnxRuntimeSlots:
        """See LanguageBackend.open_slots."""
        parts = self._open_parts
        cache = KvCache(self.manifest, num_slots, capacity, self.dtype, self.device)
        return OnnxRuntimeSlots(cache, parts.decode, parts.prefill)

    def close(self) -> None:
        """See LanguageBackend.close."""
        self._loaded = None

    @property
    def _open_parts(self) -> _Loaded:
        if (loaded := self._loaded) is None:
            raise closed_error()
        return loaded

    def _open(self, file: Path, settings: EngineSettings, *, stops_spinning: bool) -> Any:
        if self.device == "cuda":
            session = open_cuda_session(file, settings)
        else:
            session = open_session(file, settings, stops_spinning=stops_spinning)
        check_session(session, file, *decoder_tensors(self.manifest, self.dtype.name))
        return session


class OnnxRuntimeSlots:
    """The slots of a KV cache, run by the decoder; see Slots.

    Slots run together as one range, from the lowest to the highest. A slot inside the range that takes no part runs
    as a dummy: it computes one position after those it holds, which nothing reads and its next position overwrites.

    Args:
        cache: holds the slots.
        decode, prefill: sessions of the decoder, and of the one for prompts; they may be the same.
    """

    def __init__(self, cache: KvCache, decode: Any, prefill: Any) -> None:
        self._cache = cache
        self._decode, self._prefill = decode, prefill
        self._lengths = [0] * cache.num_slots
        self._ranges: dict[tuple[int, int, bool], BoundSlots] = {}

    @property
    def num_slots(self) -> int:
        """See Slots.num_slots."""
        return self._cache.num_slots

    @property
    def capacity(self) -> int:
        """See Slots.capacity."""
        return self._cache.capacity

    def length(self, slot: int) -> int:
        """See Slots.length."""
        return self._lengths[slot]

    def prefill(self, slot: int, embeds: NDArray[np.float32], prompt_length: int) -> NDArray[np.float32]:
        """See Slots.prefill."""
        length = self._lengths[slot] + len(embeds)
        bound = self._bound(slot, slot + 1, is_long=prompt_length >= MIN_PREFILL_TOKENS)
        logits: NDArray[np.float32] = bound.run(embeds[None], [length])[0]
        self._lengths[slot] = length
        return logits

    def step(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Slots.step."""
        start, stop = slots[0], slots[-1] + 1
        rows = np.array(slots) - start
        for slot in set(range(start, stop)).difference(slots):
            # The dummy position needs room: a full slot forgets its last one.
            self._lengths[slot] = min(self._lengths[slot], self.capacity - 1)
        lengths = [length + 1 for length in self._lengths[start:stop]]
        inputs = np.zeros((stop - start, 1, embeds.shape[1]), np.float32)
        inputs[rows, 0] = embeds
        logits: NDArray[np.float32] = self._bound(start, stop, is_long=False).run(inputs, lengths)[rows]
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def truncate(self, slot: int, length: int) -> None:
        """See Slots.truncate."""
        assert length <= self._lengths[slot], "a slot cannot be truncated to more than it holds"
        if length < self._lengths[slot]:
            self._cache.release(slot, length)
        self._lengths[slot] = length

    def reserve(self, capacity: int) -> None:
        """See Slots.reserve."""
        if capacity > self.capacity:
            self._cache = self._cache.grown(capacity, self._lengths)
            self._ranges.clear()

    def _bound(self, start: int, stop: int, *, is_long: bool) -> BoundSlots:
        key = (start, stop, is_long and self._prefill is not self._decode)
        if key not in self._ranges:
            if len(self._ranges) == NUM_BOUND_RANGES:
                del self._ranges[next(iter(self._ranges))]
            session = self._prefill if is_long else self._decode
            self._ranges[key] = BoundSlots(session, self._cache, start, stop)
        return self._ranges[key]
