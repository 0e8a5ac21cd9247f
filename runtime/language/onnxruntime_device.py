"""The bundle's float16 decoder on a GPU: embeddings, KV cache and weights stay there. Not yet run on one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines.device import DeviceContext, open_device
from hivtp.runtime.device_rows import DeviceRows, concatenate
from hivtp.runtime.language.device_decoder import DeviceDecoder
from hivtp.runtime.language.onnxruntime import OnnxRuntimeLanguage
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import EngineError, HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.engines.base import Device, EngineSettings
    from hivtp.engines.bundle import LanguageManifest
    from hivtp.engines.view import View
    from hivtp.runtime.device_rows import Embeddings


class OnnxRuntimeDeviceLanguage(OnnxRuntimeLanguage):
    """A decoder for a GPU, whose embeddings are DeviceRows.

    Args:
        folder: the bundle's folder, which the manifest's paths are relative to.
        manifest: describes the decoder.
        settings: how to run it.
        device: where; "cpu" takes the same path in host memory.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: the decoder is float32, or onnxruntime has no CUDA, or CUDA does not start.
        OutOfMemoryError: the decoder does not fit into the memory of the device.
    """

    def __init__(
        self, folder: Path, manifest: LanguageManifest, settings: EngineSettings, device: DeviceContext | None = None
    ) -> None:
        decoder = manifest.decoder
        assert decoder is not None, "check_backend refuses a bundle without a decoder"
        if decoder.dtype != "float16":
            raise EngineError(
                f"the decoder of {folder} is {decoder.precision}, made for the CPU: onnxruntime's attention on a GPU "
                "computes in float16 alone; export the bundle with --language-precision fp16 or int4-fp16, or run the "
                "decoder with language_device='cpu'"
            )
        self.manifest = manifest
        self.context_length = manifest.context_length
        self._decoder = DeviceDecoder(folder, manifest, device or open_device("cuda"), settings)

    @property
    def device(self) -> DeviceContext:
        """Where it runs."""
        return self._decoder.device

    @property
    def rows_device(self) -> Device:
        """See LanguageBackend.rows_device."""
        return self.device.device

    def embed(self, token_ids: Sequence[int]) -> DeviceRows:
        """See LanguageBackend.embed."""
        return DeviceRows.of_tokens(token_ids)

    def _new_sequence(self, capacity: int) -> _Sequence:
        return _Sequence(self._decoder, capacity)

    def _new_batch(self, num_rows: int, capacity: int) -> _Batch:
        return _Batch(self._decoder, num_rows, capacity)


class _Sequence:
    """One sequence in the decoder, and its KV cache."""

    def __init__(self, decoder: DeviceDecoder, capacity: int) -> None:
        self.length = 0
        self._decoder = decoder
        self._capacity = capacity
        self._cache: list[View] = []

    def append(self, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderSequence.append."""
        if not self._cache:
            self._cache = self._decoder.new_cache(1, self._capacity)
        length = self.length + len(embeds)
        logits: NDArray[np.float32] = self._decoder.run(self._cache, _device_rows(embeds), [length])[0]
        self.length = length
        return logits

    def cut(self, length: int) -> None:
        """See SequenceCache.cut."""
        assert length <= self.length, "a cache cannot be cut to more than it holds"
        self.length = length

    def reserve(self, capacity: int) -> None:
        """See GrowingSequence.reserve."""
        if capacity <= self._capacity:
            return
        capacity = max(capacity, min(2 * self._capacity, self._decoder.manifest.context_length))
        grown = []
        for old in self._cache if self.length else ():
            # Through the host: what a device can copy without one is whole tensors, and a chat grows seldom.
            values = self._decoder.device.read(old)
            room = np.zeros((1, values.shape[1], capacity - values.shape[2], values.shape[3]), dtype=values.dtype)
            grown.append(self._decoder.device.place(np.concatenate([values, room], axis=2)))
        self._cache, self._capacity = grown, capacity


class _Batch:
    """Sequences that are decoded together, each in a row of one KV cache that it keeps to its end.

    Rows are not moved. One that has ended computes on, unseen, until no row behind it is left.
    """

    def __init__(self, decoder: DeviceDecoder, num_rows: int, capacity: int) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache(num_rows, capacity)
        # Of each slot: its row, and its positions.
        self._rows = list(range(num_rows))
        self._lengths = [0] * num_rows

    def append(self, slot: int, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderBatch.append."""
        row, length = self._rows[slot], self._lengths[slot] + len(embeds)
        cache = [view.rows(row, row + 1) for view in self._cache]
        logits: NDArray[np.float32] = self._decoder.run(cache, _device_rows(embeds), [length])[0]
        self._lengths[slot] = length
        return logits

    def step(self, embeds: Embeddings) -> Sequence[NDArray[np.float32] | HivtpError]:
        """See DecoderBatch.step."""
        joint = attempt(self._step_together, embeds)
        if isinstance(joint, HivtpError):
            # What one row cannot do costs no other its answer. A step that failed has changed no length.
            return [attempt(self.append, slot, embeds[slot : slot + 1]) for slot in range(len(embeds))]
        return list(joint)

    def drop(self, slot: int, last: int) -> None:
        """See DecoderBatch.drop."""
        self._rows[slot], self._rows[last] = self._rows[last], self._rows[slot]
        self._lengths[slot], self._lengths[last] = self._lengths[last], 0

    def _step_together(self, embeds: Embeddings) -> NDArray[np.float32]:
        rows = self._rows[: len(embeds)]
        num_rows = max(rows) + 1
        # A row without a sequence takes some token as its first.
        slot_of = np.zeros(num_rows, dtype=np.int64)
        lengths = np.ones(num_rows, dtype=np.int64)
        slot_of[rows] = np.arange(len(rows))
        lengths[rows] = np.array(self._lengths[: len(rows)]) + 1
        cache = [view.rows(0, num_rows) for view in self._cache]
        logits = self._decoder.run(cache, _device_rows(embeds)[slot_of], lengths.tolist())
        self._lengths[: len(rows)] = lengths[rows].tolist()
        return logits[rows]


def _device_rows(embeds: Embeddings) -> DeviceRows:
    """Embeddings that may be an array of the host's."""
    if isinstance(embeds, DeviceRows):
        return embeds
    rows = concatenate([DeviceRows.of_tokens([]), embeds])
    assert isinstance(rows, DeviceRows), "what holds DeviceRows becomes DeviceRows"
    return rows
