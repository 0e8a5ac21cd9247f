"""The floors of a bundle's stages on a CPU."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from benchmarks.timing.floor import Format, Peaks, decode_step, prefill, vision_stage
from hivtp.engines.bundle import Bundle
from hivtp.export.checkpoint.folder import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.bundle import DecoderManifest

# ONNX Runtime multiplies in float32 on a CPU what is stored in 16 bits.
VISION_FORMATS = {"fp32": Format(4, 4), "fp16": Format(2, 2), "int8": Format(1, 4, is_int8=True)}
# The activations of those that are rounded become 8 bits in the kernels.
CPU_DECODERS = {"fp32": False, "int4": True, "int8": True, "w8a8": True}
PRODUCTS = ("MatMul", "MatMulNBits", "MatMulIntegerToFloat")


def decoder_format(file: Path, precision: str | None) -> Format | None:
    """How a decoder of a bundle holds its weights; None where it is not one for a CPU.

    Args:
        file: the decoder. Its head may be in other bits than its layers, so its bytes are counted.
        precision: of the decoder.
    """
    if precision not in CPU_DECODERS:
        return None
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    num_bytes = num_weights = 0
    for node in graph.node:
        if node.op_type not in PRODUCTS or node.input[1] not in tensors:
            continue
        held = [tensors[name] for name in node.input[1:] if name in tensors]
        num_bytes += sum(
            prod(item.dims) * onnx.helper.tensor_dtype_to_np_dtype(item.data_type).itemsize for item in held
        )
        sizes = {item.name: item.i for item in node.attribute}
        is_packed = node.op_type == "MatMulNBits"
        num_weights += sizes["K"] * sizes["N"] if is_packed else prod(tensors[node.input[1]].dims)
    return Format(num_bytes / num_weights, 4, is_int8=CPU_DECODERS[precision])


class Floors:
    """Milliseconds that no bundle of a checkpoint can go below; None where that is not known.

    Args:
        checkpoint: its folder.
        peaks: of the machine.
    """

    def __init__(self, checkpoint: Path, peaks: Peaks) -> None:
        self._config: Any = Checkpoint.open(checkpoint).config
        self._peaks = peaks

    def vision_ms(self, folder: Path, num_tiles: int = 1) -> float | None:
        """The vision stage of a bundle for this many tiles."""
        manifest = Bundle.open(folder).manifest
        precision = VISION_FORMATS.get(manifest.vision.precision)
        if precision is None:
            return None
        num_kept = None if manifest.pruning is None else manifest.vision.capacity
        return self._peaks.floor_ms(vision_stage(self._config, num_kept, precision, num_tiles))

    def ttft_ms(self, folder: Path, num_tokens: int, num_tiles: int = 1) -> float | None:
        """Vision and prefill.

        Args:
            folder: the bundle.
            num_tokens: of the prompt, those that are kept of its images included.
            num_tiles: of all images together.
        """
        decoder = _decoder(folder)
        precision = decoder_format(folder / decoder.file, decoder.precision)
        if decoder.prefill_file is not None:
            precision = decoder_format(folder / decoder.prefill_file, decoder.prefill_precision)
        vision_ms = self.vision_ms(folder, num_tiles)
        if vision_ms is None or precision is None:
            return None
        return vision_ms + self._peaks.floor_ms(prefill(self._config, num_tokens, precision))

    def decode_ms_per_token(self, folder: Path, num_tokens: int, num_new_tokens: int) -> float | None:
        """The mean decode step of an answer, whose first token comes from the prefill.

        Args:
            folder: the bundle.
            num_tokens: of the prompt.
            num_new_tokens: of the answer, at least 2.
        """
        decoder = _decoder(folder)
        precision = decoder_format(folder / decoder.file, decoder.precision)
        if precision is None:
            return None
        # Work grows evenly with the positions before a step, so the mean step is the one of the mean position.
        num_cached = num_tokens + (num_new_tokens - 2) / 2
        return self._peaks.floor_ms(decode_step(self._config, num_cached, precision))


def _decoder(folder: Path) -> DecoderManifest:
    language = Bundle.open(folder).manifest.language
    assert language is not None, "the bundle answers"
    assert language.decoder is not None, "it holds its decoder"
    return language.decoder
