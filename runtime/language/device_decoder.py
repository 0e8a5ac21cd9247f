"""The decoder on a device: prompts gathered there, a KV cache that stays there, and logits that come to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.base import EngineSettings
from hivtp.runtime.device_rows import TOKENS, DeviceRows
from hivtp.runtime.language.kv_cache import cache_names, cache_shape

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.engines.bundle import LanguageManifest
    from hivtp.engines.device import DeviceContext, Run
    from hivtp.engines.view import View


class DeviceDecoder:
    """The decoder's three graphs in sessions of one device.

    Args:
        folder: the bundle's folder, which the manifest's paths are relative to.
        manifest: describes a float16 decoder.
        device: where they run.
        settings: how.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot load a graph there.
        OutOfMemoryError: the decoder does not fit into the memory of the device.
    """

    def __init__(
        self, folder: Path, manifest: LanguageManifest, device: DeviceContext, settings: EngineSettings
    ) -> None:
        decoder = manifest.decoder
        assert decoder is not None, "check_backend refuses a bundle without a decoder"
        assert decoder.embed_file is not None, "a float16 decoder comes with the graphs for its embeddings"
        assert decoder.insert_file is not None, "likewise"
        self.manifest = manifest
        self.device = device
        self.dtype = np.dtype(decoder.dtype)
        self._cache_names = cache_names(manifest)
        self._session = device.open_session(folder / decoder.file, settings)
        # They move rows: more threads than one would only wait for each other.
        small = EngineSettings(num_threads=1)
        self._embed = device.open_session(folder / decoder.embed_file, small)
        self._insert = device.open_session(folder / decoder.insert_file, small)

    def new_cache(self, num_rows: int, capacity: int) -> list[View]:
        """Memory for sequences: `cache_names` in turn, each of `cache_shape`.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        shape = cache_shape(self.manifest, num_rows, capacity)
        return [self.device.empty(shape, self.dtype) for _ in self._cache_names]

    def run(self, cache: Sequence[View], embeds: DeviceRows, lengths: Sequence[int]) -> NDArray[np.float32]:
        """Run the decoder on new positions, and write their keys and values into the cache.

        Args:
            cache: rows of a cache, as `new_cache` gives it.
            embeds: [rows * num_new]; several rows take one position each, since their logits are the last.
            lengths: positions of each row, the new ones included. The mask is padded on the right, as
                grouped-query attention wants it.

        Returns:
            The logits [rows, vocab] of the last position of each row.

        Raises:
            EngineError: onnxruntime failed.
            OutOfMemoryError: the memory of the device ran out.
        """
        gathered, held = self._gather(embeds)
        num_rows = len(lengths)
        logits = np.empty((num_rows, 1, self.manifest.vocab_size), dtype=self.dtype)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        inputs: dict[str, Any] = {
            "inputs_embeds": gathered.reshape(num_rows, -1, self.manifest.hidden_size),
            "attention_mask": mask,
        }
        outputs: dict[str, Any] = {"logits": logits}
        for name, memory in zip(self._cache_names, cache, strict=True):
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = memory
        self.device.run(self._session, inputs, outputs)
        # The host has not waited for the runs before this one.
        held.clear()
        return logits[:, 0].astype(np.float32)

    def _gather(self, embeds: DeviceRows) -> tuple[View, list[Run]]:
        """The embeddings [length, hidden] in the decoder's dtype, and what must be held until they have been used."""
        shape = (len(embeds), self.manifest.hidden_size)
        token_ids = np.where(embeds.source_of == TOKENS, embeds.row_of, 0)
        gathered = self.device.empty(shape, self.dtype)
        held = [self.device.run(self._embed, {"token_ids": token_ids}, {"embeds": gathered}, waits=False)]
        for place, source in enumerate(embeds.sources):
            row_of = np.where(embeds.source_of == place, embeds.row_of, -1)
            if (row_of < 0).all():
                continue
            rows = self.device.place(source)
            inputs: dict[str, View | NDArray[Any]] = {
                "embeds": gathered,
                "rows": rows.reshape(-1, rows.shape[-1]),
                "row_of": row_of,
            }
            gathered = self.device.empty(shape, self.dtype)
            held.append(self.device.run(self._insert, inputs, {"inserted": gathered}, waits=False))
        return gathered, held
