"""Sequences of a transformers model, each with a KV cache of its own, or several padded into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.engines.torch.errors import torch_errors
from hivtp.runtime.language.torch_rows import gather
from hivtp.runtime.outcome import attempt
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hivtp.runtime.device_rows import Embeddings

    # Keys and values of one layer, [rows, kv_heads, length, head_size] each.
    Layer = tuple[torch.Tensor, torch.Tensor]


class Decoder:
    """A causal language model of transformers, fed with embeddings.

    Args:
        model: on its device, in its dtype.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._table = model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self._table.weight.device
        return device

    def run(
        self, embeds: Embeddings, num_rows: int, cache: Any, padding: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Run the model on new positions.

        Args:
            embeds: [num_rows * num_new, hidden], row after row.
            num_rows: sequences that run together.
            cache: a DynamicCache of what comes before, to which they are added.
            padding: positions at the start of each row that belong to no sequence; None where there are none.

        Returns:
            The logits [rows, vocab] of the last position of each row.

        Raises:
            EngineError: torch failed.
            OutOfMemoryError: the memory of the device ran out.
        """
        import torch

        masks = {}
        num_new = len(embeds) // num_rows
        if padding is not None:
            columns = torch.arange(cache.get_seq_length() + num_new)
            positions = columns - torch.tensor(padding)[:, None]
            masks["attention_mask"] = (positions >= 0).long().to(self.device)
            masks["position_ids"] = positions[:, -num_new:].to(self.device)
        with torch_errors(self.device), torch.inference_mode():
            outputs = self._model(
                inputs_embeds=gather(embeds, self._table.weight).reshape(num_rows, num_new, -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **masks,
            )
            return to_numpy(outputs.logits[:, -1])


class CachedSequence:
    """One sequence, and its KV cache; a DecoderSequence, and a SequenceCache for a chat.

    Args:
        decoder: runs it.
        layers: keys and values of one row, which it begins with.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[Layer] = ()) -> None:
        self._decoder = decoder
        self._cache = _cache_of(layers)
        self.length: int = self._cache.get_seq_length()

    @property
    def layers(self) -> list[Layer]:
        """Keys and values of each layer."""
        return _layers_of(self._cache)

    def append(self, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderSequence.append."""
        try:
            logits: NDArray[np.float32] = self._decoder.run(embeds, 1, self._cache)[0]
            self.length += len(embeds)
        finally:
            # A run that failed may have got through some layers.
            _cut(self._cache, self.length)
        return logits

    def cut(self, length: int) -> None:
        """See SequenceCache.cut."""
        assert length <= self.length, "a cache cannot be cut to more than it holds"
        self.length = length
        _cut(self._cache, length)


class CachedBatch:
    """Sequences that are decoded together; a DecoderBatch.

    For their joint steps their caches are padded on the left and stacked. When a sequence leaves, or a joint step
    fails, they come apart again.

    Args:
        decoder: runs them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # Either these hold the sequences, or `_joint` does, with the padding of each row.
        self._sequences: list[CachedSequence] = []
        self._joint: Any = None
        self._padding: list[int] = []

    def append(self, slot: int, embeds: Embeddings) -> NDArray[np.float32]:
        """See DecoderBatch.append."""
        assert slot == len(self._sequences), "a sequence begins in the first free slot"
        self._sequences.append(CachedSequence(self._decoder))
        return self._sequences[slot].append(embeds)

    def step(self, embeds: Embeddings) -> Sequence[NDArray[np.float32] | HivtpError]:
        """See DecoderBatch.step."""
        joint = attempt(self._step_together, embeds)
        if isinstance(joint, HivtpError):
            # What one row cannot do costs no other its answer.
            self._part()
            return [attempt(sequence.append, embeds[slot : slot + 1]) for slot, sequence in enumerate(self._sequences)]
        return list(joint)

    def drop(self, slot: int, last: int) -> None:
        """See DecoderBatch.drop."""
        self._part()
        assert last == len(self._sequences) - 1, "the slots in use are the first ones"
        self._sequences[slot] = self._sequences[last]
        self._sequences.pop()

    def _step_together(self, embeds: Embeddings) -> NDArray[np.float32]:
        if self._joint is None:
            self._join()
        length = self._joint.get_seq_length()
        try:
            logits = self._decoder.run(embeds, len(embeds), self._joint, self._padding)
            length += 1
        finally:
            _cut(self._joint, length)
        return logits

    def _join(self) -> None:
        import torch
        from torch.nn.functional import pad

        longest = max(sequence.length for sequence in self._sequences)
        padding = [longest - sequence.length for sequence in self._sequences]

        def stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([pad(row, (0, 0, num, 0)) for row, num in zip(rows, padding, strict=True)])

        layers: list[Layer] = []
        with torch_errors(self._decoder.device), torch.inference_mode():
            for rows in zip(*(sequence.layers for sequence in self._sequences), strict=True):
                keys, values = zip(*rows, strict=True)
                layers.append((stacked(keys), stacked(values)))
            self._joint = _cache_of(layers)
        self._padding, self._sequences = padding, []

    def _part(self) -> None:
        if self._joint is None:
            return
        layers = _layers_of(self._joint)
        self._sequences = [
            CachedSequence(
                self._decoder,
                [(keys[row : row + 1, :, num:], values[row : row + 1, :, num:]) for keys, values in layers],
            )
            for row, num in enumerate(self._padding)
        ]
        self._joint = None


def _cache_of(layers: Sequence[Layer]) -> Any:
    """A DynamicCache that holds these tensors themselves, no copies."""
    from transformers import DynamicCache

    # Without a config it keeps every position, also for a model with a sliding window, so that it can be cut.
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], index)
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache


def _layers_of(cache: Any) -> list[Layer]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cut(cache: Any, length: int) -> None:
    """Forget all but the first positions of each layer, as far as it has more."""
    for layer in cache.layers:
        layer.crop(min(0, length - layer.get_seq_length()))


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Logits as an array."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array
