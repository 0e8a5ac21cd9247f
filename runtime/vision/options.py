"""How images are encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from hivtp.engines import EngineName
from hivtp.engines.base import EngineSettings, Precision
from hivtp_ops.errors import SettingsError

VisionEngine = Literal[EngineName, "transformers"]
# The base tile and 6 x 6 more, the largest grid in use (LLaVA-OneVision's); llava-v1.6 never needs more than 5.
# Each tile is a whole run of the vision encoder, so pinpoints beyond this are more likely a mistake than a wish.
MAX_TILES = 37
# A tile of ViT-L takes about 0.15 GiB of activations in float32.
MAX_TILES_PER_RUN = 8
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class VisionOptions:
    """How images are encoded.

    Args:
        engine: what runs the vision graph: "onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt" or
            "tensorrt-rtx"; or "transformers", the tower of the checkpoint that the language backend of that name has.
            "auto" takes the first that works: a TensorRT plan that fits this machine, ONNX Runtime on a GPU,
            transformers where the language model runs in it on a GPU, ONNX Runtime on the CPU; and warns of what it
            passed over.
        num_threads: threads of one run on the CPU; None takes the physical cores.
        uses_cuda_graph: see EngineSettings.
        precision: of openvino; see EngineSettings.
        max_tiles: an image that becomes more tiles than this, its base tile included, is refused (LLaVA-NeXT).
        max_tiles_per_run: more tiles than this go through the graph in several runs: fewer take less memory.
        cache_bytes: memory for the embeddings of images seen before; 0 keeps none.

    Raises:
        SettingsError: an option of the wrong type or out of its range, or no such engine.
    """

    engine: VisionEngine = "auto"
    num_threads: int | None = None
    uses_cuda_graph: bool = False
    max_tiles: int = MAX_TILES
    max_tiles_per_run: int = MAX_TILES_PER_RUN
    cache_bytes: int = CACHE_BYTES
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        engines = [name for part in get_args(VisionEngine) for name in (get_args(part) or (part,))]
        if self.engine not in engines:
            raise SettingsError(f"no vision engine is named {self.engine!r}; there are {', '.join(engines)}")
        # An image has a base tile, and at least one more.
        minima = {"max_tiles": 2, "max_tiles_per_run": 1, "cache_bytes": 0}
        for name, minimum in minima.items():
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SettingsError(f"{name} must be a whole number, {minimum} or more, not {value!r}")
        if not isinstance(self.uses_cuda_graph, bool):
            raise SettingsError(f"uses_cuda_graph must be True or False, not {self.uses_cuda_graph!r}")
        _ = self.engine_settings
        if self.precision != VisionOptions.precision and self.engine != "openvino":
            raise SettingsError(
                f"precision {self.precision!r} belongs to the vision engine openvino; {self.engine} computes as the "
                "graph says: leave it out, or choose openvino"
            )

    @property
    def engine_settings(self) -> EngineSettings:
        """How an engine runs the vision graph."""
        return EngineSettings(self.num_threads, self.uses_cuda_graph, self.precision)
