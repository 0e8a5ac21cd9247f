"""The decoder in ONNX Runtime: our loop over `inputs_embeds`, with the KV cache updated in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.runtime.language.base import ChooseToken, embedding_table
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.engines.base import EngineSettings
    from hivtp.engines.bundle import LanguageManifest


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
        self.manifest = manifest
        self.context_length = manifest.context_length
        self._session = open_session(folder / manifest.file, settings)
        self._embeddings = embedding_table(folder / manifest.embeddings, (manifest.vocab_size, manifest.hidden_size))

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See LanguageBackend.embed."""
        return self._embeddings[np.asarray(token_ids, dtype=np.int64)].astype(np.float32, copy=False)

    def is_end(self, token_id: int) -> bool:
        """See LanguageBackend.is_end."""
        return token_id in self.manifest.eos_token_ids

    def generate(
        self, inputs_embeds: NDArray[np.float32], max_new_tokens: int, choose_token: ChooseToken
    ) -> Iterator[int]:
        """See LanguageBackend.generate."""
        length = len(inputs_embeds)
        num_tokens = min(max_new_tokens, self.context_length - length)
        sequence = _Sequence(self._session, self.manifest, capacity=length + num_tokens)
        logits = sequence.append(inputs_embeds)
        for step in range(num_tokens):
            token_id = choose_token(logits)
            yield token_id
            if self.is_end(token_id):
                return
            if step + 1 < num_tokens:
                logits = sequence.append(self.embed([token_id]))


class _Sequence:
    """One sequence in the decoder: its KV cache, and the buffers bound to the session.

    Past and present are bound to one buffer per layer. Grouped-query attention then writes the new keys
    and values behind the old ones instead of copying the past at every step.
    """

    def __init__(self, session: Any, manifest: LanguageManifest, capacity: int) -> None:
        import onnxruntime

        self._session = session
        self._binding = session.io_binding()
        self._length = 0
        self._attention_mask = np.ones((1, capacity), dtype=np.int64)
        # The bindings hold addresses only, so these buffers must live as long as the sequence.
        self._logits = np.empty((1, 1, manifest.vocab_size), dtype=np.float32)
        self._buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(self._logits)]
        self._binding.bind_ortvalue_output("logits", self._buffers[0])
        cache_shape = (1, manifest.num_kv_heads, capacity, manifest.head_size)
        for layer in range(manifest.num_layers):
            for kind in ("key", "value"):
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(cache_shape, dtype=np.float32))
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", buffer)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", buffer)
                self._buffers.append(buffer)

    def append(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the decoder on [num, hidden] new positions; the logits [vocab] of the last, valid until the next call."""
        self._length += len(embeds)
        self._binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None]))
        self._binding.bind_cpu_input("attention_mask", self._attention_mask[:, : self._length])
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed in the decoder: {error}") from error
        logits: NDArray[np.float32] = self._buffers[0].numpy()[0, 0]
        return logits
