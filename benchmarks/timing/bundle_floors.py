"""The floors of our bundles' stages on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.timing.floor import Peaks, decode_step, prefill, vision_stage
from hivtp.engines.bundle import Bundle
from hivtp.export.checkpoint.folder import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# By the precisions whose products run at the rate that benchmarks.timing.peaks measures: on a CPU ONNX Runtime
# multiplies in float32 what is stored as fp16. Rounded weights have no floor here: fp8 and int8 graphs multiply partly
# in 8 bits and partly in more, and each width of weights has kernels of its own, so no one rate bounds them.
ELEMENT_BYTES = {"cpu": {"fp32": 4, "fp16": 2}, "cuda": {"fp16": 2}}


class Floors:
    """Milliseconds that no bundle of a checkpoint can go below on a device; None where that is not known.

    Args:
        checkpoint: its folder.
        device: one of `benchmarks.timing.hugging_face.devices`.
        peaks: of the device.
    """

    def __init__(self, checkpoint: Path, device: str, peaks: Peaks) -> None:
        self._config: Any = Checkpoint.open(checkpoint).config
        self._element_bytes = ELEMENT_BYTES[device]
        self._peaks = peaks

    def vision_ms(self, bundle: Path, num_tiles: int = 1) -> float | None:
        """The vision stage of so many tiles."""
        manifest = Bundle.open(bundle).manifest
        element_bytes = self._element_bytes.get(manifest.vision.precision)
        if element_bytes is None:
            return None
        num_kept = None if manifest.pruning is None else manifest.vision.capacity
        return self._peaks.floor_ms(vision_stage(self._config, num_kept, element_bytes, num_tiles))

    def ttft_ms(
        self, bundle: Path, language_precision: str, num_tokens: int, num_tiles: int = 1, batch_size: int = 1
    ) -> float | None:
        """Vision and prefill.

        Args:
            bundle: its folder.
            language_precision: in the words of ExportSettings.
            num_tokens: of a prompt, those that are kept of its picture included.
            num_tiles: of all pictures together.
            batch_size: prompts.
        """
        vision_ms, element_bytes = self.vision_ms(bundle, num_tiles), self._element_bytes.get(language_precision)
        if vision_ms is None or element_bytes is None:
            return None
        return vision_ms + self._peaks.floor_ms(prefill(self._config, num_tokens, element_bytes, batch_size))

    def decode_ms_per_token(
        self, language_precision: str, num_tokens: int, num_new_tokens: int, batch_size: int = 1
    ) -> float | None:
        """A step, in the mean over those of an answer: its first token comes from the prefill.

        Args:
            language_precision: in the words of ExportSettings.
            num_tokens: of a prompt.
            num_new_tokens: of an answer, at least 2.
            batch_size: answers, which take their steps together.
        """
        element_bytes = self._element_bytes.get(language_precision)
        if element_bytes is None:
            return None
        # Work grows evenly with the positions before a step, so the mean step is the one of the mean position.
        num_cached = num_tokens + (num_new_tokens - 2) / 2
        return self._peaks.floor_ms(decode_step(self._config, num_cached, element_bytes, batch_size))

    def batch_ms(self, bundle: Path, language_precision: str, batch_size: int, num_new_tokens: int) -> float | None:
        """The answers of a batch, about a picture of one tile each; their text, of several lengths, is left out.

        Args:
            bundle: its folder.
            language_precision: in the words of ExportSettings.
            batch_size: answers.
            num_new_tokens: of an answer, at least 2.
        """
        vision = Bundle.open(bundle).manifest.vision
        num_tokens = vision.num_prefix_tokens + vision.capacity
        first = self.ttft_ms(bundle, language_precision, num_tokens, num_tiles=batch_size, batch_size=batch_size)
        step = self.decode_ms_per_token(language_precision, num_tokens, num_new_tokens, batch_size)
        return None if first is None or step is None else first + (num_new_tokens - 1) * step
