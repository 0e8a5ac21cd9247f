"""The bundle's decoder in OpenVINO, on the CPU: a KV cache in blocks, and all slots in one run."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hivtp.engines.openvino.graph import check_graph, read_graph
from hivtp.engines.openvino.library import compile_graph, load_openvino, resolve_precision, run_errors, shared_core
from hivtp.engines.openvino.paged import INDICES, LONGEST, POSITIONS, page_attention
from hivtp.engines.signature import decoder_tensors
from hivtp.runtime.language.base import closed_error, embedding_table, kv_bytes_per_position
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.engines.base import EngineSettings
    from hivtp.engines.bundle import Bundle

# Memory of the caches by their element type; numpy has no bfloat16.
_DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


class _Loaded(NamedTuple):
    """What a decoder takes memory for."""

    embeddings: NDArray[np.floating]
    compiled: Any


class OpenVinoLanguage:
    """A decoder written by ONNX Runtime GenAI's model builder, with paged attention in OpenVINO.

    Prompts run in the decoder, too: a prefill decoder of the bundle is not used, since OpenVINO is no faster with it.

    Args:
        bundle: an opened bundle.
        settings: how to run it.

    Raises:
        BundleError: graph or embeddings are damaged, or not those that the manifest describes.
        EngineError: openvino cannot run the decoder, or not in that precision.
        MissingExtraError: openvino or onnx is not installed.
        OutOfMemoryError: memory ran out.
    """

    def __init__(self, bundle: Bundle, settings: EngineSettings) -> None:
        manifest = bundle.manifest.language
        assert manifest is not None, "the factory refuses an encoder bundle"
        decoder = manifest.decoder
        assert decoder is not None, "the factory refuses a bundle without a decoder"
        if decoder.dtype != "float32":
            raise EngineError(
                f"the decoder of {bundle.folder} is {decoder.precision}, made for a GPU; export the bundle with "
                "--language-precision fp32, int8 or int4 for openvino"
            )
        openvino, core = load_openvino(), shared_core()
        precision = resolve_precision(core, settings.precision)
        self.context_length = manifest.context_length
        self.description = f"{decoder.precision} decoder in openvino in {precision}"
        embeddings = embedding_table(bundle.folder / decoder.embeddings, (manifest.vocab_size, manifest.hidden_size))
        model = read_graph(core, bundle, decoder.file)
        check_graph(bundle.folder / decoder.file, model, *decoder_tensors(manifest, decoder.dtype))
        page_attention(openvino, model)
        compiled = compile_graph(core, model, settings, precision)
        self.kv_bytes_per_position = kv_bytes_per_position(manifest, 4 if precision == "float32" else 2)
        self._loaded: _Loaded | None = _Loaded(embeddings, compiled)

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See LanguageBackend.embed."""
        return self._open_parts.embeddings[np.asarray(token_ids, np.int64)].astype(np.float32, copy=False)

    def open_slots(self, num_slots: int, capacity: int) -> OpenVinoSlots:
        """See LanguageBackend.open_slots."""
        return OpenVinoSlots(self._open_parts.compiled, num_slots, capacity)

    def close(self) -> None:
        """See LanguageBackend.close."""
        self._loaded = None

    @property
    def _open_parts(self) -> _Loaded:
        if (loaded := self._loaded) is None:
            raise closed_error()
        return loaded


class OpenVinoSlots:
    """The slots of a KV cache in blocks, each slot with as many blocks as its capacity takes; see Slots.

    Args:
        compiled: the decoder with paged attention.
        num_slots: sequences.
        capacity: positions of each.

    Raises:
        OutOfMemoryError: memory ran out.
    """

    def __init__(self, compiled: Any, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._compiled = compiled
        self._lengths = [0] * num_slots
        caches = [port for port in compiled.inputs if "_cache." in port.get_any_name()]
        # [kv_heads, positions of a block, head_size] and the type, which OpenVINO chose when it compiled.
        self._shapes = {
            port.get_any_name(): [length.get_length() for length in list(port.get_partial_shape())[1:]]
            for port in caches
        }
        self._types = {port.get_any_name(): port.get_element_type() for port in caches}
        self._block_size: int = next(iter(self._shapes.values()))[1]
        self._memories: dict[str, NDArray[Any]] = {}
        self._request: Any = None
        self._allocate(capacity)

    def length(self, slot: int) -> int:
        """See Slots.length."""
        return self._lengths[slot]

    def prefill(self, slot: int, embeds: NDArray[np.float32], prompt_length: int) -> NDArray[np.float32]:  # noqa: ARG002  one decoder runs prompts of any length
        """See Slots.prefill."""
        logits: NDArray[np.float32] = self._run([slot], embeds[None])[0]
        return logits

    def step(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Slots.step."""
        return self._run(slots, embeds[:, None])

    def truncate(self, slot: int, length: int) -> None:
        """See Slots.truncate."""
        assert length <= self._lengths[slot], "a slot cannot be truncated to more than it holds"
        self._lengths[slot] = length

    def reserve(self, capacity: int) -> None:
        """See Slots.reserve."""
        if capacity > self.capacity:
            self._allocate(capacity)

    @property
    def _blocks_per_slot(self) -> int:
        return self._blocks(self.capacity)

    def _blocks(self, length: int) -> int:
        return -(-length // self._block_size)

    def _allocate(self, capacity: int) -> None:
        """Memory for this many positions of each slot, with what the slots hold."""
        import openvino

        num_blocks = self._blocks(capacity)
        with run_errors("allocating the KV cache"):
            # The operating system gives pages as they are written, so positions never reached cost nothing.
            memories = {
                name: np.zeros((self.num_slots * num_blocks, *shape), _DTYPES[self._types[name].get_type_name()])
                for name, shape in self._shapes.items()
            }
            for name, memory in self._memories.items():
                for slot, length in enumerate(self._lengths):
                    source, target, held = slot * self._blocks_per_slot, slot * num_blocks, self._blocks(length)
                    memories[name][target : target + held] = memory[source : source + held]
            request = self._compiled.create_infer_request()
            for name, memory in memories.items():
                request.set_tensor(name, openvino.Tensor(memory, openvino.Shape(memory.shape), self._types[name]))
        self._memories, self._request, self.capacity = memories, request, capacity

    def _run(self, slots: Sequence[int], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append positions [slots, num_new, hidden], the same number to each slot; the logits [slots, vocab]."""
        num_new = embeds.shape[1]
        past = [self._lengths[slot] for slot in slots]
        lengths = [length + num_new for length in past]
        assert max(lengths) <= self.capacity, "a slot has room for what is appended to it"
        blocks = [
            np.arange(self._blocks(length)) + slot * self._blocks_per_slot
            for slot, length in zip(slots, lengths, strict=True)
        ]
        indices = (
            past,
            np.arange(len(slots) + 1) * num_new,
            np.concatenate(blocks),
            list(accumulate(map(len, blocks), initial=0)),
        )
        inputs: dict[str, NDArray[Any]] = {
            name: np.array(values, np.int32) for name, values in zip(INDICES, indices, strict=True)
        }
        inputs[LONGEST] = np.array(max(lengths), np.int32)
        inputs[POSITIONS] = (np.array(past)[:, None] + np.arange(num_new)).reshape(-1)
        inputs["inputs_embeds"] = np.ascontiguousarray(embeds, np.float32)
        with run_errors("running the decoder"):
            self._request.infer(inputs, share_inputs=True)
            logits: NDArray[np.float32] = self._request.get_output_tensor(0).data[:, 0]
        for slot, length in zip(slots, lengths, strict=True):
            self._lengths[slot] = length
        return logits
