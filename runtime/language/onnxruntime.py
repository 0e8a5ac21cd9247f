"""The decoder in ONNX Runtime: our loops over `inputs_embeds`, for one sequence and for several together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.runtime.language.base import ChooseToken, DecodeRequest, SequenceCache, embedding_table
from hivtp.runtime.language.decoding import DecoderSequence, decode, decode_batch_or_halves, num_new_tokens
from hivtp.runtime.language.kv_cache import BoundRows, allocate_cache
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.engines.base import Device, EngineSettings
    from hivtp.engines.bundle import DecoderManifest, LanguageManifest
    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.language.decoding import DecoderBatch


# From so many positions on, a decoder for prompts takes them. With fewer, int4 in blocks of 128 was as fast in one
# product of 4096 x 4096, and int4 in blocks of 32 up to 6 positions.
LEAST_PROMPT = 16


class OnnxRuntimeLanguage:
    """A decoder written by ONNX Runtime GenAI's model builder, driven through IOBinding.

    Args:
        folder: the bundle's folder, which the manifest's paths are relative to.
        manifest: describes decoder and embeddings.
        settings: how to run it.

    Raises:
        BundleError: the embeddings are damaged.
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load the decoder.
    """

    def __init__(self, folder: Path, manifest: LanguageManifest, settings: EngineSettings) -> None:
        decoder = manifest.decoder
        assert decoder is not None, "check_backend refuses a bundle without a decoder"
        self.manifest = manifest
        self.context_length = manifest.context_length
        self._sessions = DecoderSessions(folder, decoder, settings)
        self._embeddings = embedding_table(folder / decoder.embeddings, (manifest.vocab_size, manifest.hidden_size))

    def embed(self, token_ids: Sequence[int]) -> Embeddings:
        """See LanguageBackend.embed."""
        return self._embeddings[np.asarray(token_ids, dtype=np.int64)].astype(np.float32, copy=False)

    @property
    def rows_device(self) -> Device | None:
        """See LanguageBackend.rows_device."""
        return None

    def is_end(self, token_id: int) -> bool:
        """See LanguageBackend.is_end."""
        return token_id in self.manifest.eos_token_ids

    def new_cache(self) -> GrowingSequence:
        """See LanguageBackend.new_cache."""
        return self._new_sequence(capacity=1)

    def generate(
        self,
        inputs_embeds: Embeddings,
        max_new_tokens: int,
        choose_token: ChooseToken,
        cache: SequenceCache | None = None,
    ) -> Iterator[int]:
        """See LanguageBackend.generate."""
        length = len(inputs_embeds) + (0 if cache is None else cache.length)
        num_tokens = min(max_new_tokens, self.context_length - length)
        sequence = self._new_sequence(length + num_tokens) if cache is None else cast("GrowingSequence", cache)
        sequence.reserve(length + num_tokens)
        yield from decode(self, sequence, inputs_embeds, num_tokens, choose_token)

    def generate_batch(self, requests: Sequence[DecodeRequest]) -> Iterator[dict[int, int | HivtpError]]:
        """See LanguageBackend.generate_batch.

        The decoder gives logits of the last position only, so each prompt is prefilled alone, into its own row of
        one KV cache. Where there is no memory for all rows at once, the halves are decoded one after the other.
        """
        if not requests:
            return
        capacity = max(len(request.inputs_embeds) + num_new_tokens(self, request) for request in requests)
        yield from decode_batch_or_halves(self, requests, lambda: self._new_batch(len(requests), capacity))

    def _new_sequence(self, capacity: int) -> GrowingSequence:
        return _Sequence(self._sessions, self.manifest, capacity)

    def _new_batch(self, num_rows: int, capacity: int) -> DecoderBatch:
        return _Batch(self._sessions, self.manifest, num_rows, capacity)


class DecoderSessions:
    """The decoder of a bundle, and the one for prompts where it holds one; both read and write the same KV cache.

    Args:
        folder: the bundle's folder.
        manifest: names the files.
        settings: how to run them.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load a decoder.
    """

    def __init__(self, folder: Path, manifest: DecoderManifest, settings: EngineSettings) -> None:
        self._decode = self._prefill = open_session(folder / manifest.file, settings)
        if manifest.prefill_file is not None:
            # The other decoder runs at once after it, and its threads would spin against that one's.
            self._prefill = open_session(folder / manifest.prefill_file, settings, stops_spinning=True)

    def session_for(self, num_positions: int) -> Any:
        """The session that runs so many positions of one sequence."""
        return self._prefill if num_positions >= LEAST_PROMPT else self._decode


class GrowingSequence(DecoderSequence, Protocol):
    """A sequence whose memory can grow."""

    def reserve(self, capacity: int) -> None:
        """Make room for so many positions; at least twice the room there was, so that turns rarely copy."""


class _Sequence:
    """One sequence in the decoder, and its KV cache."""

    def __init__(self, sessions: DecoderSessions, manifest: LanguageManifest, capacity: int) -> None:
        self.length = 0
        self._sessions = sessions
        self._manifest = manifest
        self._cache = allocate_cache(manifest, 1, capacity)
        self._bound: BoundRows | None = None

    @property
    def capacity(self) -> int:
        """The most positions that there is room for."""
        return int(self._cache[0].shape[2])

    def append(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See DecoderSequence.append."""
        rows = self._rows(self._sessions.session_for(len(embeds)))
        logits: NDArray[np.float32] = rows.run(embeds[None], [self.length + len(embeds)])[0]
        self.length += len(embeds)
        return logits

    def cut(self, length: int) -> None:
        """See SequenceCache.cut."""
        assert length <= self.length, "a cache cannot be cut to more than it holds"
        self.length = length

    def reserve(self, capacity: int) -> None:
        """See GrowingSequence.reserve."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, min(2 * self.capacity, self._manifest.context_length))
        cache = allocate_cache(self._manifest, 1, capacity)
        for new, old in zip(cache, self._cache, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._cache, self._bound = cache, None

    def _rows(self, session: Any) -> BoundRows:
        """The cache bound to a session, which is the same for all steps after a prompt."""
        if self._bound is None or self._bound.session is not session:
            self._bound = BoundRows(session, self._manifest, self._cache)
        return self._bound


class _Batch:
    """Sequences that are decoded together: the first rows of one KV cache."""

    def __init__(self, sessions: DecoderSessions, manifest: LanguageManifest, num_rows: int, capacity: int) -> None:
        self._sessions = sessions
        self._manifest = manifest
        self._cache = allocate_cache(manifest, num_rows, capacity)
        self._lengths = [0] * num_rows
        self._joint: BoundRows | None = None

    def append(self, slot: int, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See DecoderBatch.append."""
        length = self._lengths[slot] + len(embeds)
        rows = self._bind(slot, slot + 1, num_positions=len(embeds))
        logits: NDArray[np.float32] = rows.run(embeds[None], [length])[0]
        self._lengths[slot] = length
        return logits

    def step(self, embeds: NDArray[np.float32]) -> Sequence[NDArray[np.float32] | HivtpError]:
        """See DecoderBatch.step."""
        joint = attempt(self._step_together, embeds)
        if isinstance(joint, HivtpError):
            # What one row cannot do costs no other its answer. A step that failed has changed no length.
            return [attempt(self.append, slot, embed[None]) for slot, embed in enumerate(embeds)]
        return list(joint)

    def drop(self, slot: int, last: int) -> None:
        """See DecoderBatch.drop."""
        if slot != last:
            length = self._lengths[last]
            for array in self._cache:
                array[slot, :, :length] = array[last, :, :length]
        self._lengths[slot], self._lengths[last] = self._lengths[last], 0

    def _step_together(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._joint is None or self._joint.num_rows != len(embeds):
            self._joint = self._bind(0, len(embeds), num_positions=1)
        lengths = [length + 1 for length in self._lengths[: len(embeds)]]
        logits = self._joint.run(embeds[:, None], lengths)
        self._lengths[: len(embeds)] = lengths
        return logits

    def _bind(self, start: int, stop: int, *, num_positions: int) -> BoundRows:
        # A range of whole rows is contiguous, so binding it copies nothing.
        cache = [array[start:stop] for array in self._cache]
        return BoundRows(self._sessions.session_for(num_positions), self._manifest, cache)
