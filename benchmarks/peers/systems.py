"""What is compared: our bundles by engine and precision, and OpenVINO GenAI in its configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.export.settings import ExportSettings
from hivtp.export.targets import settings_for

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.timing.worker import Pass


@dataclass(frozen=True)
class Ours:
    """One of our systems.

    Attributes:
        export: the bundle.
        engine: of the vision graph, and the language backend.
        precision: of openvino.
    """

    export: ExportSettings
    engine: str = "onnxruntime"
    precision: str = "auto"


_QUANTISED = {"preset": "192", "vision_fallback": None}
OURS = {
    "fp32 / fp32, preset 192, onnxruntime": Ours(ExportSettings(preset="192")),
    "fp32 / fp32, preset 192, openvino": Ours(ExportSettings(preset="192"), "openvino"),
    "fp32 / fp32, preset 192, openvino all in bfloat16": Ours(ExportSettings(preset="192"), "openvino", "bfloat16"),
    "target cpu, preset 192": Ours(settings_for("cpu", **_QUANTISED)),
    "target cpu, unpruned": Ours(settings_for("cpu", is_pruned=False, vision_fallback=None)),
}
GENAI_FLOAT = "OpenVINO GenAI, fp32 model, its defaults (bf16)"
GENAI_INT4 = "OpenVINO GenAI, int4, its defaults"
GENAI_BEST = "OpenVINO GenAI, int4, vision in w8a8"
# The precision of its weights, and whether its vision is quantised whole.
GENAI = {GENAI_FLOAT: ("fp32", False), GENAI_INT4: ("int4", False), GENAI_BEST: ("int4", True)}
# Each of ours beside the peer of its class, and which goals it has.
PAIRS = {
    "fp32 / fp32, preset 192, onnxruntime": (GENAI_FLOAT, "none"),
    "fp32 / fp32, preset 192, openvino": (GENAI_FLOAT, "float"),
    "fp32 / fp32, preset 192, openvino all in bfloat16": (GENAI_FLOAT, "float"),
    "target cpu, preset 192": (GENAI_BEST, "rounded"),
    "target cpu, unpruned": (GENAI_BEST, "rounded, unpruned"),
}
GOALS = {
    ("float", "ttft_ms"): 0.60,
    ("float", "decode_ms_per_token"): 0.90,
    ("rounded", "ttft_ms"): 0.55,
    ("rounded", "decode_ms_per_token"): 0.70,
    ("rounded, unpruned", "ttft_ms"): 1.00,
    ("busy", "decode_ms_per_token"): 1.5,
}
# These also decode while another process takes a core.
BUSY = ("target cpu, preset 192", "fp32 / fp32, preset 192, openvino", GENAI_BEST)


def open_ours(num_threads: int, bundle: Path, name: str, num_new_tokens: int) -> Pass:
    """A bundle in the pipeline, greedy."""
    from benchmarks.speed.ttft import make_pass
    from hivtp import LanguageOptions, Pipeline, VisionOptions

    ours = OURS[name]
    engine: Any = ours.engine
    precision: Any = ours.precision
    vision = VisionOptions(engine, num_threads, precision=precision)
    language = LanguageOptions(engine, num_threads=num_threads, precision=precision)
    return make_pass(Pipeline.load(bundle, vision=vision, language=language), num_new_tokens)
