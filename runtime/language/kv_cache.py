"""The KV cache of the ONNX Runtime decoder: its memory, and its rows bound to a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.engines.bundle import LanguageManifest


def cache_names(manifest: LanguageManifest) -> list[str]:
    """What follows "past_key_values." and "present." in the decoder's names, in the order of the memory."""
    return [f"{layer}.{kind}" for layer in range(manifest.num_layers) for kind in ("key", "value")]


def cache_shape(manifest: LanguageManifest, num_rows: int, capacity: int) -> tuple[int, int, int, int]:
    """The shape of the keys, or values, of one layer: [num_rows, kv_heads, capacity, head_size]."""
    return num_rows, manifest.num_kv_heads, capacity, manifest.head_size


def allocate_cache(manifest: LanguageManifest, num_rows: int, capacity: int) -> list[NDArray[np.float32]]:
    """Memory for sequences: `cache_names` in turn, each of `cache_shape`.

    The operating system gives pages of it as they are written, so what is never reached costs nothing.
    """
    shape = cache_shape(manifest, num_rows, capacity)
    return [np.zeros(shape, dtype=np.float32) for _ in cache_names(manifest)]


class BoundRows:
    """Rows of a KV cache bound to the decoder, which runs them as one batch.

    Past and present are bound to one buffer per layer. Grouped-query attention then writes the new keys
    and values behind the old ones instead of copying the past at every step.

    Args:
        session: the decoder.
        manifest: describes it.
        cache: as `allocate_cache` gives it, or a range of its rows.
    """

    def __init__(self, session: Any, manifest: LanguageManifest, cache: Sequence[NDArray[np.float32]]) -> None:
        import onnxruntime

        self.session = session
        self._binding = session.io_binding()
        self.num_rows, _, capacity, _ = cache[0].shape
        self._positions = np.arange(capacity)
        # The bindings hold addresses only, so these buffers must live as long as they do.
        self._logits = np.empty((self.num_rows, 1, manifest.vocab_size), dtype=np.float32)
        self.buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (self._logits, *cache)]
        self._binding.bind_ortvalue_output("logits", self.buffers[0])
        for name, buffer in zip(cache_names(manifest), self.buffers[1:], strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            self._binding.bind_ortvalue_output(f"present.{name}", buffer)

    def run(self, embeds: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.float32]:
        """Run the decoder on new positions.

        Args:
            embeds: [rows, num_new, hidden]; several rows take one position each, since their logits are the last.
            lengths: positions of each row, the new ones included. The mask is padded on the right, as
                grouped-query attention wants it.

        Returns:
            The logits [rows, vocab] of the last position of each row, valid until the next call.

        Raises:
            EngineError: onnxruntime failed.
        """
        # Bound by address as well: both must be held until the run is over.
        mask = (self._positions[: max(lengths)] < np.array(lengths)[:, None]).astype(np.int64)
        embeds = np.ascontiguousarray(embeds)
        self._binding.bind_cpu_input("inputs_embeds", embeds)
        self._binding.bind_cpu_input("attention_mask", mask)
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed in the decoder: {error}") from error
        return self._logits[:, 0]
