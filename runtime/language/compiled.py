"""A transformers model whose runs are compiled, over few shapes; on CUDA each becomes a CUDA graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from hivtp.engines.torch.errors import compiled_runs
from hivtp.runtime.language.dynamic_cache import to_numpy
from hivtp.runtime.language.static_cache import CachePool
from hivtp.runtime.language.torch_rows import gather

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hivtp.runtime.device_rows import Embeddings

P = ParamSpec("P")
T = TypeVar("T")

# Prompts whose length gets a shape of its own, where lengths recur.
NUM_EXACT_LENGTHS = 4


class CompiledDecoder:
    """A causal language model of transformers over static caches, compiled.

    There are four kinds of runs: a prompt, which is alone in its cache; more positions after it; one, which is a step;
    and a step of several sequences. The first two are padded to a `padded_length`. Each shape is compiled when it first
    occurs, which takes from seconds to minutes, and on CUDA recorded as a CUDA graph.

    A CUDA graph belongs to the thread that recorded it, so all runs are made in one thread, one at a time, and are
    asked for through `call`.

    Args:
        model: on its device, in its dtype.
        context_length: the most positions of a sequence.
        has_exact_lengths: every picture becomes as many tokens, so the lengths of prompts recur.

    Attributes:
        table: the embeddings of all tokens, [vocab, hidden], on the model's device and in its dtype.

    Raises:
        EngineError: torch cannot compile here.
    """

    def __init__(self, model: Any, context_length: int, has_exact_lengths: bool) -> None:
        import torch

        self._model = model
        self.table: torch.Tensor = model.get_input_embeddings().weight
        self.caches = CachePool(model, context_length + _step(context_length))
        self._num_exact = NUM_EXACT_LENGTHS if has_exact_lengths else 0
        self._exact_lengths: set[int] = set()
        # Gradients are switched off thread by thread.
        self._thread = ThreadPoolExecutor(1, "hivtp-language", torch.set_grad_enabled, (False,))
        mode = "reduce-overhead" if self.table.device.type == "cuda" else None
        with self._errors():
            self._begin, self._extend, self._step_rows = (
                torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
                for function in (_begin, _extend, _step_rows)
            )

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the thread of the model, without gradients."""
        return self._thread.submit(function, *args, **kwargs).result()

    def padded_length(self, num_new: int, is_first: bool) -> int:
        """The length that so many new positions are padded to.

        A step stays 1. Else it is the next multiple of 64, or from 1,025 of 128, from 2,049 of 256, and so on. Where
        lengths recur, the first prompts set lengths of their own: one of such a length is not padded.

        Args:
            num_new: at least 1.
            is_first: they begin a sequence.
        """
        if num_new == 1 and not is_first:
            return 1
        if is_first and len(self._exact_lengths) < self._num_exact:
            self._exact_lengths.add(num_new)
        if is_first and num_new in self._exact_lengths:
            return num_new
        step = _step(num_new)
        return -(-num_new // step) * step

    def run(self, embeds: Embeddings, padded_length: int, cache: Any, is_first: bool) -> NDArray[np.float32]:
        """Run the model on new positions of one sequence.

        Args:
            embeds: [num_new, hidden].
            padded_length: see there; the cache has room for so many.
            cache: a static one of what comes before, to which they are added.
            is_first: nothing comes before.

        Returns:
            The logits [vocab] of the last of them.

        Raises:
            EngineError: torch failed, or cannot compile the model.
            OutOfMemoryError: the memory of the device ran out.
        """
        import torch

        with self._errors():
            # Padding comes last, where no position before it sees it, and later ones overwrite it.
            padding = (0, 0, 0, padded_length - len(embeds))
            padded = torch.nn.functional.pad(gather(embeds, self.table), padding)[None]
            num_new = torch.full((1,), len(embeds), device=self.table.device)
            # The logits of the run before are copied by now, so its memory is free.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            logits = (self._begin if is_first else self._extend)(self._model, padded, num_new, cache)
            return to_numpy(logits)

    def step(
        self, embeds: torch.Tensor, positions: torch.Tensor, is_used: torch.Tensor, cache: Any
    ) -> NDArray[np.float32]:
        """Run the model on one new position of each row of a cache.

        Args:
            embeds: [rows, 1, hidden] in the table's dtype; like the others on its device.
            positions: [rows, 1] int64, of each row by itself, its padding not counted.
            is_used: [rows, capacity] bool, False where a row is padded.
            cache: a static one, to which they are added.

        Returns:
            The logits [rows, vocab].

        Raises:
            EngineError: torch failed, or cannot compile the model.
            OutOfMemoryError: the memory of the device ran out.
        """
        import torch

        with self._errors():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return to_numpy(self._step_rows(self._model, embeds, positions, is_used, cache))

    def _errors(self) -> AbstractContextManager[None]:
        return compiled_runs(self.table.device, "language model", "language_compile")


def _step(num_new: int) -> int:
    """What a length is padded to a multiple of: an eighth of it or less, from 512."""
    return max(64, 1 << (num_new - 1).bit_length() >> 4)


def _begin(model: Any, embeds: torch.Tensor, num_new: torch.Tensor, cache: Any) -> torch.Tensor:
    """Run a prompt [1, length, hidden], of which `num_new` [1] are no padding; the logits [vocab] of the last."""
    from transformers import DynamicCache

    # Attention to the prompt alone needs no mask, and so the fastest kernel; in the static cache it would see all
    # of its capacity.
    prompt = DynamicCache()
    outputs = model(inputs_embeds=embeds, past_key_values=prompt, use_cache=True, logits_to_keep=num_new - 1)
    for layer, new in zip(cache.layers, prompt.layers, strict=True):
        layer.keys[:, :, : embeds.shape[1]] = new.keys
        layer.values[:, :, : embeds.shape[1]] = new.values
        layer.cumulative_length.copy_(num_new[0])
    logits: torch.Tensor = outputs.logits[0, 0]
    return logits


def _extend(model: Any, embeds: torch.Tensor, num_new: torch.Tensor, cache: Any) -> torch.Tensor:
    """Run more positions after those in the cache; see `_begin`."""
    outputs = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=num_new - 1)
    for layer in cache.layers:
        layer.cumulative_length.add_(num_new[0] - embeds.shape[1])
    logits: torch.Tensor = outputs.logits[0, 0]
    return logits


def _step_rows(
    model: Any, embeds: torch.Tensor, positions: torch.Tensor, is_used: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Run one more position [rows, 1, hidden] of each row; see `CompiledDecoder.step`."""
    outputs = model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=is_used,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = outputs.logits[:, 0]
    return logits
