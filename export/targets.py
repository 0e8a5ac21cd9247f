"""Where a bundle will run, as one word for the options that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hivtp.export.decoder.build import PrefillPrecision
    from hivtp.export.graph.builder import VisionPrecision
    from hivtp.export.language import LanguagePrecision

TargetName = Literal["cpu", "cpu-small", "cpu-exact", "cuda", "tensorrt"]


@dataclass(frozen=True)
class Target:
    """What is best on one kind of machine, by docs/targets.md.

    Attributes:
        purpose: for people.
        vision_precision: of the vision graph.
        language_precision: of the decoder.
        vision_fallback: what the vision graph is written in where the check at export refuses the first.
        block_size: of the decoder's weights; None where they are not rounded in blocks.
        prefill_precision: of a second decoder, for prompts.
        plan_library: what a plan of the vision graph is built for at the end; None builds none.
    """

    purpose: str
    vision_precision: VisionPrecision
    language_precision: LanguagePrecision
    vision_fallback: VisionPrecision | None = None
    block_size: int | None = None
    prefill_precision: PrefillPrecision | None = None
    plan_library: Literal["tensorrt"] | None = None


TARGETS: Mapping[TargetName, Target] = {
    # Prompts in w8a8: first token in 0.80 of the time. Blocks of 128: a decode step in 0.75.
    "cpu": Target("fastest on a CPU", "int8", "int4", "fp32", 128, "w8a8"),
    "cpu-small": Target("least memory on a CPU", "int8", "int4", "fp32", 128),
    "cpu-exact": Target("nothing rounded; onnxruntime, or openvino in bfloat16", "fp32", "fp32"),
    "cuda": Target("all of it on an NVIDIA GPU", "fp16", "fp16"),
    "tensorrt": Target("vision in a TensorRT plan for this GPU", "fp16", "fp16", plan_library="tensorrt"),
}


def settings_for(target: TargetName, **given: Any) -> ExportSettings:
    """What to export for a target.

    Args:
        target: which.
        **given: fields of ExportSettings, which come first. With another language precision than the target's, nothing
            else of its decoder is taken; with another vision precision, no fallback.

    Raises:
        SpecError: there is no such target, or the settings exclude each other.
    """
    if target not in TARGETS:
        raise SpecError(f"target is {target!r}; choose one of {', '.join(TARGETS)}")
    chosen = TARGETS[target]
    picked: dict[str, Any] = {"vision_precision": chosen.vision_precision}
    if given.get("vision_precision", chosen.vision_precision) == chosen.vision_precision:
        picked["vision_fallback"] = chosen.vision_fallback
    has_decoder = given.get("graph", ExportSettings.graph) == "vision"
    if has_decoder and given.get("language_precision", chosen.language_precision) == chosen.language_precision:
        picked |= {
            "language_precision": chosen.language_precision,
            "block_size": chosen.block_size,
            "prefill_precision": chosen.prefill_precision,
        }
    return ExportSettings(**{**picked, **given})
