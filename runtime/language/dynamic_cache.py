"""The slots of a transformers model: a KV cache for each, padded and stacked for joint steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp.runtime.language.torch_errors import torch_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    # Keys and values of one layer, [sequences, kv_heads, length, head_size] each.
    Layer = tuple[torch.Tensor, torch.Tensor]


class TransformersSlots:
    """See Slots. The caches of slots that step together are stacked, and come apart when others do.

    Args:
        model: a causal language model of transformers, on its device, in its dtype.
        num_slots: how many sequences.
        capacity: positions of each; nothing is allocated before it is used.
    """

    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        self._model = model
        self._capacity = capacity
        self._caches = [_cache_of([]) for _ in range(num_slots)]
        self._lengths = [0] * num_slots
        # While some slots are stacked, this holds their caches.
        self._joint: _Joint | None = None
        # Slots whose caches are parts of one that was stacked, and hold the memory of all of it.
        self._parts: set[int] = set()

    @property
    def num_slots(self) -> int:
        """See Slots.num_slots."""
        return len(self._caches)

    @property
    def capacity(self) -> int:
        """See Slots.capacity."""
        return self._capacity

    def length(self, slot: int) -> int:
        """See Slots.length."""
        return self._lengths[slot]

    def prefill(
        self,
        slot: int,
        embeds: NDArray[np.float32],
        prompt_length: int,  # noqa: ARG002  one model runs prompts of any length
    ) -> NDArray[np.float32]:
        """See Slots.prefill."""
        return self._append(slot, embeds)

    def step(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Slots.step."""
        if len(slots) == 1:
            return self._append(slots[0], embeds)[None]
        joint = self._joined(list(slots))
        length = joint.cache.get_seq_length()
        try:
            logits = self._run(embeds[:, None], joint.cache, joint.padding)
            length += 1
        finally:
            # A run that failed may have got through some layers.
            _truncate(joint.cache, length)
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def truncate(self, slot: int, length: int) -> None:
        """See Slots.truncate."""
        assert length <= self._lengths[slot], "a slot cannot be truncated to more than it holds"
        if length < self._lengths[slot]:
            self._part([slot])
            self._lengths[slot] = length
            if length == 0:
                # A truncated tensor holds the memory of the whole one.
                self._caches[slot] = _cache_of([])
            _truncate(self._caches[slot], length)

    def reserve(self, capacity: int) -> None:
        """See Slots.reserve."""
        self._capacity = max(capacity, self._capacity)

    def _append(self, slot: int, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        self._part([slot])
        self._copy_parts(but=[slot])
        try:
            logits: NDArray[np.float32] = self._run(embeds[None], self._caches[slot])[0]
            self._lengths[slot] += len(embeds)
        finally:
            # A run that failed may have got through some layers.
            _truncate(self._caches[slot], self._lengths[slot])
        return logits

    def _joined(self, slots: list[int]) -> _Joint:
        """The caches of these slots, stacked."""
        import torch
        from torch.nn.functional import pad

        if self._joint is not None and self._joint.slots == slots:
            return self._joint
        self._part(slots)
        longest = max(self._lengths[slot] for slot in slots)
        padding = [longest - self._lengths[slot] for slot in slots]

        def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([pad(part, (0, 0, num, 0)) for part, num in zip(parts, padding, strict=True)])

        layers: list[Layer] = []
        with torch_errors(self._model.device, "language model"), torch.inference_mode():
            for parts in zip(*(_layers_of(self._caches[slot]) for slot in slots), strict=True):
                keys, values = zip(*parts, strict=True)
                layers.append((stacked(keys), stacked(values)))
        self._joint = _Joint(slots, _cache_of(layers), padding)
        for slot in slots:
            # Its memory is given back; `_part` brings it anew.
            self._caches[slot] = _cache_of([])
        self._copy_parts(but=slots)
        return self._joint

    def _part(self, slots: Sequence[int]) -> None:
        """Take the joint cache apart, if it holds one of these slots."""
        joint = self._joint
        if joint is None or not set(slots) & set(joint.slots):
            return
        layers = _layers_of(joint.cache)
        for row, (slot, num) in enumerate(zip(joint.slots, joint.padding, strict=True)):
            self._caches[slot] = _cache_of(
                [(keys[row : row + 1, :, num:], values[row : row + 1, :, num:]) for keys, values in layers]
            )
        self._parts.update(joint.slots)
        self._joint = None

    def _copy_parts(self, but: Sequence[int]) -> None:
        """Give back the memory of a cache that was stacked; slots that run are copied by that."""
        self._parts.difference_update(but)
        with torch_errors(self._model.device, "language model"):
            for slot in list(self._parts):
                layers = _layers_of(self._caches[slot])
                self._caches[slot] = _cache_of([(keys.clone(), values.clone()) for keys, values in layers])
                self._parts.remove(slot)

    def _run(
        self, embeds: NDArray[np.float32], cache: Any, padding: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Run the model on new positions.

        Args:
            embeds: [sequences, num_new, hidden] float32.
            cache: a DynamicCache of what comes before, to which they are added.
            padding: positions at the start of each sequence that belong to none; None where there are none.

        Returns:
            The logits [sequences, vocab] float32 of the last position of each.
        """
        import torch

        table = self._model.get_input_embeddings().weight
        masks = {}
        if padding is not None:
            columns = torch.arange(cache.get_seq_length() + embeds.shape[1])
            positions = columns - torch.tensor(padding)[:, None]
            masks["attention_mask"] = (positions >= 0).long().to(table.device)
            masks["position_ids"] = positions[:, -embeds.shape[1] :].to(table.device)
        with torch_errors(table.device, "language model"), torch.inference_mode():
            outputs = self._model(
                inputs_embeds=torch.tensor(embeds).to(table),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **masks,
            )
            logits: NDArray[np.float32] = outputs.logits[:, -1].float().cpu().numpy()
        return logits


class _Joint:
    """Slots whose caches are stacked, each padded on the left to the longest."""

    def __init__(self, slots: list[int], cache: Any, padding: list[int]) -> None:
        self.slots = slots
        self.cache = cache
        self.padding = padding


def _cache_of(layers: Sequence[Layer]) -> Any:
    """A DynamicCache that holds these tensors themselves, not copies."""
    from transformers import DynamicCache

    # Without a config it keeps every position, also for a model with a sliding window, so that it can be truncated.
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], index)
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache


def _layers_of(cache: Any) -> list[Layer]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _truncate(cache: Any, length: int) -> None:
    """Forget all but the first positions of each layer."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
