"""OpenVINO as an engine for a vision graph."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from hivtp.engines.openvino.graph import check_graph, read_graph
from hivtp.engines.openvino.library import (
    FloatType,
    compile_graph,
    load_openvino,
    resolve_precision,
    run_errors,
    shared_core,
)
from hivtp.engines.openvino.scores import EMBEDS, cut_after_scores
from hivtp.engines.signature import vision_tensors
from hivtp_ops.errors import EngineWarning

if TYPE_CHECKING:
    import numpy as np

    from hivtp.engines.base import Arrays, EngineSettings
    from hivtp.engines.bundle import Bundle

# Graphs that hold rounded weights, and are computed in float32 around them.
ROUNDED_PRECISIONS = ("int8", "fp8")


class OpenVinoEngine:
    """The vision graph of a bundle, compiled for the CPU.

    In bfloat16 the importance scores of float32 would be missed by a little, and with them some of the patches that it
    keeps. With the precision "auto" all that they depend on is a graph of its own, in float32.

    Args:
        bundle: an opened bundle.
        settings: how to run it.

    Raises:
        BundleError: the graph is damaged, or not the one that the manifest describes.
        EngineError: openvino cannot run it, or not in that precision.
        MissingExtraError: openvino or onnx is not installed.
        OutOfMemoryError: memory ran out.
    """

    max_tiles: int | None = None

    def __init__(self, bundle: Bundle, settings: EngineSettings) -> None:
        openvino, core, vision = load_openvino(), shared_core(), bundle.manifest.vision
        is_rounded = vision.precision in ROUNDED_PRECISIONS
        precision: FloatType = "float32" if is_rounded else resolve_precision(core, settings.precision)
        if vision.precision == "fp8":
            warnings.warn(
                f"openvino runs the fp8 vision graph of {bundle.folder} without products of 8 bits, several "
                "times slower than onnxruntime; choose onnxruntime, or export with --vision-precision fp32",
                EngineWarning,
                stacklevel=4,
            )
        model = read_graph(core, bundle, vision.file)
        if vision.graph == "vision":
            check_graph(bundle.vision_file, model, *vision_tensors(bundle.manifest))
        self.output_names = tuple(output.get_any_name() for output in model.outputs)
        self.description = f"openvino in {precision}"
        todo: list[tuple[Any, FloatType, tuple[str, ...]]] = [(model, precision, self.output_names)]
        if precision == "bfloat16" and len(self.output_names) > 1 and settings.precision == "auto":
            if vision.graph == "encoder":
                # What it is for are features and scores, all of them.
                todo, self.description = [(model, "float32", self.output_names)], "openvino in float32"
            else:
                parts = cut_after_scores(openvino, model)
                todo = [(parts.scores, "float32", parts.names), (parts.rest, precision, (EMBEDS,))]
                self.description += ", scores in float32"
        self._parts = [(compile_graph(core, part, settings, kind), names) for part, kind, names in todo]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        values: Any = dict(inputs)
        for compiled, names in self._parts:
            with run_errors("running the vision graph"):
                # A request of its own holds the memory of its outputs, so that several threads may run at once.
                request = compiled.create_infer_request()
                request.infer(values, share_inputs=True)
                found = [request.get_output_tensor(index).data for index in range(len(compiled.outputs))]
            outputs |= dict(zip(names, found, strict=False))
            values = found[len(names) :]
        return {name: outputs[name] for name in self.output_names}
